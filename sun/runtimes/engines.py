"""The two runtimes: how each turns a graph into its files, with weights in fp32, fp16 or int8, and runs them."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..common.reading import printable
from .contents import ExportError

Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]
"""Of inputs by name the outputs in order."""

_NEEDS = {"openvino": ("openvino",), "onnx": ("onnxruntime",)}
_NEEDS_TO_WRITE = {"openvino": ("openvino", "onnx"), "onnx": ("onnxruntime", "onnx")}
_INSTALL = 'pip install "speedupnet-sun[export]"'
_SMALL = 512  # values: most biases, norms and factors stay as they are


def require(runtime: str, writing: bool = False, weights: str = "fp32") -> None:
    """Raise ExportError, saying what to install, unless the runtime's packages are here."""
    needed = [*(_NEEDS_TO_WRITE if writing else _NEEDS)[runtime]]
    if writing and runtime == "openvino" and weights == "int8":
        needed.append("nncf")
    lacking = [name for name in needed if importlib.util.find_spec(name) is None]
    if lacking:
        raise ExportError(
            f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not installed, which "
            f"{'exporting to' if writing else 'a model exported to'} {runtime} needs. Install with: {_INSTALL}"
        )


def versions(runtime: str) -> dict[str, str]:
    """Of the runtime, for the record."""
    from importlib.metadata import version

    return {name: version(name) for name in _NEEDS[runtime]}


def write(runtime: str, source: Path, folder: Path, weights: str) -> None:
    """Turn the ONNX graph ``source`` into ``folder/model.*``. Raises ExportError."""
    folder.mkdir(parents=True, exist_ok=True)
    (_write_openvino if runtime == "openvino" else _write_onnx)(source, folder, weights)


def load(runtime: str, folder: Path, weights: str, *, threads: int | None = None, device: str = "CPU") -> Run:
    """The graph of ``folder``, ready to run. Raises ExportError.

    threads: processor threads, None for all. device: OpenVINO's name of one; ONNX Runtime runs on the CPU.
    """
    try:
        opened = _load_openvino if runtime == "openvino" else _load_onnx
        return opened(folder, weights, threads, device)
    except Exception as error:  # each runtime has exceptions of its own
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(
            f"{printable(str(folder))} could not be loaded by {runtime}: {printable(reason)[:300]} Export the model "
            "again with the versions that are installed here."
        ) from error


# --- OpenVINO ----------------------------------------------------------------------------------------------------


def _quietly() -> None:
    """nncf sends usage statistics unless it believes itself under test; nothing here may send anything."""
    os.environ.setdefault("NNCF_CI", "1")


def _write_openvino(source: Path, folder: Path, weights: str) -> None:
    _quietly()
    import openvino

    model = openvino.Core().read_model(source)
    if weights == "int8":
        import nncf

        logging.getLogger("nncf").setLevel(logging.WARNING)
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=weights == "fp16")


def _load_openvino(folder: Path, weights: str, threads: int | None, device: str) -> Run:
    import openvino

    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if weights == "fp32":
        options["INFERENCE_PRECISION_HINT"] = "f32"  # else a CPU that has bf16 takes that
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.Core().compile_model(folder / "model.xml", device, options)
    outputs = len(compiled.outputs)
    request = compiled.create_infer_request()

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        found = request.infer(dict(inputs))
        return [np.array(found[i]) for i in range(outputs)]  # its own memory is written over by the next call

    return run


# --- ONNX Runtime ------------------------------------------------------------------------------------------------


def _write_onnx(source: Path, folder: Path, weights: str) -> None:
    import onnx

    model = onnx.load(source)
    if weights == "int8":
        model = _quantized_onnx(model)
    if weights != "fp32":
        _store_in_half(model)
    _save_onnx(model, folder / "model.onnx")


def _quantized_onnx(model: Any) -> Any:
    """Matrices in int8, in blocks of 32 with a scale each, by ONNX Runtime's own quantizer. It has none for the weights
    of convolutions alone."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    quantizer = MatMulNBitsQuantizer(model, bits=8, block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    return quantizer.model.model


def _save_onnx(model: Any, file: Path) -> None:
    import onnx

    onnx.save_model(model, file, save_as_external_data=True, location=f"{file.name}.data", size_threshold=1024)


def _store_in_half(model: Any) -> None:
    """Large weights in fp16, each cast back where it is used: arithmetic in fp32, files of half the size."""
    import onnx
    from onnx import numpy_helper

    casts = []
    scales = {name for node in model.graph.node if node.op_type == "MatMulNBits" for name in node.input[1:]}
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < _SMALL or weight.name in scales:
            continue
        if not np.isfinite(values.astype(np.float16)).all():
            raise ExportError(f"{weight.name} holds numbers too large for fp16. Export with --weights fp32.")
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    for i, cast in enumerate(casts):
        model.graph.node.insert(i, cast)


def _load_onnx(folder: Path, weights: str, threads: int | None, device: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Threads that wait for work spin by default, which other programs on the machine pay for.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    known = {given.name for given in session.get_inputs()}

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return list(session.run(None, {name: value for name, value in inputs.items() if name in known}))

    return run
