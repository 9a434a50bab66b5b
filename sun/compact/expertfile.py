"""Files of experts: safetensors, beside the file of the compact U-Net they belong to."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..common.atomic import write_atomically
from ..common.errors import SunFileError
from ..common.reading import ReadError, parse_json, printable
from ..common.weights import DTYPES, header_of, values_of
from .experts import ExpertConv, Experts
from .structure import CompactError, Shape

FORMAT = "sun-experts-1"
SUFFIX = ".experts.safetensors"
"""``compact.safetensors`` has its experts in ``compact.experts.safetensors``."""
IN_FOLDER = "experts.safetensors"
"""Name in the folder of a training, whose folder ``unet`` holds the compact U-Net."""
WHAT = "a file of experts"
_NAME = re.compile(r"((?:down|up)_blocks\.\d{1,2}\.resnets\.\d{1,2}\.conv[12])\.(.+)")
_PARTS = ("kernels", "biases", "centre", "squeeze.weight", "squeeze.bias", "choose.weight", "choose.bias")


def experts_beside(path: str | os.PathLike[str]) -> Path | None:
    """The file of experts that lies beside a compact U-Net's checkpoint, or in its folder; None if there is none."""
    path = Path(path)
    file = path / IN_FOLDER if path.is_dir() else path.with_suffix(SUFFIX)
    return file if file.is_file() else None


def write_experts(experts: Experts, path: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> Path:
    """Write experts in one piece. Raises CompactError where a number is not finite, OSError."""
    tensors = {}
    for name, layer in experts.by_name():
        for part, tensor in layer.state_dict().items():
            stored = tensor.detach().cpu().to(torch.float32 if part == "centre" else dtype).contiguous()
            tensors[f"{name}.{part}"] = _finite(stored, f"{Path(path).name} was not written: {name}.{part}")
    metadata = {
        "format": FORMAT,
        "temperature": f"{experts.temperature:.9g}",
        "unet": json.dumps(experts.shape.as_json()),
    }
    return write_atomically(path, lambda handle: handle.write(save(tensors, metadata)))


def read_experts(path: str | os.PathLike[str]) -> Experts:
    """The experts in a file, in its number format. Raises CompactError for what is no complete, finite file of them."""
    where = printable(str(path))
    try:
        header = header_of(path, WHAT)
        layers, shape, temperature = _layout(header.tensors, header.metadata, where)
        tensors = values_of(Path(path), header)
    except (SunFileError, ReadError) as error:
        raise CompactError(str(error)) from error
    made = {}
    for name, parts in layers.items():
        values = {part: _finite(tensors[f"{name}.{part}"], f"{where}: {name}.{part}") for part in parts}
        kernels, squeeze = values["kernels"], values["squeeze.weight"]
        layer = ExpertConv(kernels, values["biases"], squeeze.shape[1] - kernels.shape[2], len(squeeze))
        layer.load_state_dict(values)
        made[name] = layer
    return Experts(made, shape, temperature).requires_grad_(False).eval()


def _layout(
    tensors: dict[str, Tensor], metadata: dict[str, str], where: str
) -> tuple[dict[str, dict[str, Tensor]], Shape, float]:
    if metadata.get("format") != FORMAT:
        raise CompactError(
            f"{where} holds no experts of a compact U-Net (format {FORMAT}). sun train-compact --set experts=4 makes "
            "some."
        )
    shape = Shape.from_json(parse_json(metadata.get("unet", ""), where), where)
    temperature = _number(metadata.get("temperature", ""), where)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or match[2] not in _PARTS or tensor.dtype not in DTYPES:
            raise CompactError(
                f"{where} has a tensor {printable(name)[:80]} that cannot belong to experts. Get it again."
            )
        layers.setdefault(match[1], {})[match[2]] = tensor
    if not layers:
        raise CompactError(f"{where} holds no experts at all. Get it again.")
    for name, parts in layers.items():
        if missing := [part for part in _PARTS if part not in parts]:
            raise CompactError(f"{where} is incomplete: {name}.{missing[0]} is missing. Get it again.")
        _check_sizes(name, parts, where)
    return layers, shape, temperature


def _check_sizes(name: str, parts: dict[str, Tensor], where: str) -> None:
    kernels, squeeze = parts["kernels"].shape, parts["squeeze.weight"].shape
    count = kernels[0] if kernels else 0
    hidden = squeeze[0] if squeeze else 0
    expected = {
        "biases": (count, kernels[1] if len(kernels) == 5 else 0),
        "centre": (count,),
        "squeeze.bias": (hidden,),
        "choose.weight": (count, hidden),
        "choose.bias": (count,),
    }
    wrong = [part for part, size in expected.items() if tuple(parts[part].shape) != size]
    if len(kernels) != 5 or not 2 <= count <= 64 or len(squeeze) != 2 or squeeze[1] <= kernels[2] or hidden < 1:
        wrong.insert(0, "kernels")
    if wrong:
        raise CompactError(
            f"{where}: {name}.{wrong[0]} is {list(parts[wrong[0]].shape)}, which cannot be. Get it again."
        )


def _number(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1e6:
        raise CompactError(
            f"{where} gives a temperature of {printable(text)[:40]!r}, no positive number. Get it again."
        )
    return number


def _finite(tensor: Tensor, what: str) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise CompactError(f"{what} holds NaN or infinity. Get it again, or train anew with a smaller lr.")
    return tensor
