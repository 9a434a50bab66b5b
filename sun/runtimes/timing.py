"""What a U-Net call with SUN, a plain one and a decoder take in torch and in the runtimes (``sun bench-runtimes``).

Every kind runs in a process of its own, in turn, round after round, so that its peak memory is its own and a machine
that slows down slows all alike. Besides the time on the clock the processor seconds of all threads are taken, which
other programs on the machine change little.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import AutoencoderTiny

from ..adapter import SunAdapter
from ..pipelines import NEGATIVE, RUN, new_run
from ..pipelines.attach import attach, detach
from . import engines
from .graphs import in_plain_float, unet_graph, vae_decoder_graph

CALLS = 2
REFERENCE_ROWS = 50  # 25 steps with classifier-free guidance


class Models(Protocol):
    unet: Any
    vae: Any


def tiny_decoder(models: Models) -> Any:
    """An autoencoder of TAESD's shape, with random weights."""
    torch.manual_seed(0)
    return AutoencoderTiny(latent_channels=models.vae.config.latent_channels)


def write_graphs(
    models: Models, adapter: SunAdapter, folder: Path, kinds: Sequence[tuple[str, str]], plain: bool = True
) -> None:
    """Graphs of the U-Net with SUN (``sun``), the plain one and the decoders (``full``, ``tiny``), for each
    (runtime, weights); int8 only of the U-Net with SUN."""
    tiny = tiny_decoder(models)
    with in_plain_float(models.unet, models.vae, tiny, adapter):
        attach(models.unet, adapter)
        makers = {"sun": lambda: unet_graph(models.unet, adapter, False, None, ())}
        if plain:
            makers["plain"] = lambda: unet_graph(models.unet, None, False, None, ())
        makers |= {
            "full": lambda: vae_decoder_graph(models.vae, None),
            "tiny": lambda: vae_decoder_graph(tiny, None),
        }
        for name, make in makers.items():
            wanted = [kind for kind in kinds if name == "sun" or kind[1] == "fp32"]
            if not wanted:
                continue
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                source = Path(scratch) / "source.onnx"
                make().write(source)
                for runtime, weights in wanted:
                    engines.write(runtime, source, folder / f"{runtime}-{weights}" / name, weights)
        detach(models.unet)


def measure_graphs(folder: Path, runtime: str, weights: str, size: int, threads: int) -> dict[str, Any]:
    """One round of a runtime: ``{NAME: {"seconds", "processor_seconds"}}`` and the process's peak ``memory_gib``."""
    inputs = {name: tensor.numpy() for name, tensor in _inputs(size).items()}
    found: dict[str, Any] = {}
    for name in ("sun", "plain", "full", "tiny"):
        place = folder / f"{runtime}-{weights}" / name
        if not place.is_dir():
            continue
        run = engines.load(runtime, place, weights, threads=threads)
        given = {"latents": inputs["sample"]} if name in ("full", "tiny") else _wanted(inputs, name)
        found[name] = _timed(lambda run=run, given=given: run(given))  # type: ignore[misc]
        del run
        if name == "sun":
            found["memory_gib"] = _peak_memory()
    return found


def measure_torch(models: Models, adapter: SunAdapter, compiled: bool, size: int, threads: int) -> dict[str, Any]:
    """The same of torch in float32, compiled or not."""
    torch.set_num_threads(threads)
    inputs = _inputs(size)
    found: dict[str, Any] = {}
    tiny = tiny_decoder(models)
    with torch.inference_mode(), in_plain_float(models.unet, models.vae, tiny, adapter):
        unet = torch.compile(models.unet, dynamic=False) if compiled else models.unet
        given = (inputs["sample"], torch.tensor(499), inputs["positive"])
        if not compiled:
            found["plain"] = _timed(lambda: unet(*given))
        attach(unet, adapter)
        options = {NEGATIVE: inputs["negative"], RUN: new_run(unet)}
        found["sun"] = _timed(lambda: unet(*given, cross_attention_kwargs=options))
        found["memory_gib"] = _peak_memory()
        if not compiled:
            found["full"] = _timed(lambda: models.vae.decode(inputs["sample"]))
            found["tiny"] = _timed(lambda: tiny.decode(inputs["sample"]))
    return found


def summary(rounds: Mapping[str, Sequence[Mapping[str, Any]]], steps: int = 4) -> dict[str, dict[str, float]]:
    """Medians over the rounds of each kind, and what follows: a picture of ``steps`` steps by each decoder and one of
    25 steps with guidance, computed as so many measured calls (a guided step is two plain rows) and a measured decode.
    A kind without a plain call or decoder of its own has torch's decoders and no reference."""
    table: dict[str, dict[str, float]] = {}
    for kind, found in rounds.items():
        row: dict[str, float] = {"memory_gib": max(float(r["memory_gib"]) for r in found)}
        for name in ("sun", "plain", "full", "tiny"):
            for unit in ("seconds", "processor_seconds"):
                if all(name in r for r in found):
                    row[f"{name}_{unit}"] = statistics.median(r[name][unit] for r in found)
        for unit in ("seconds", "processor_seconds"):
            if f"plain_{unit}" in row:
                row[f"sun_ratio_{unit}"] = row[f"sun_{unit}"] / row[f"plain_{unit}"]
            for decoder in ("full", "tiny"):
                if f"{decoder}_{unit}" not in row:
                    continue
                row[f"picture_{decoder}_{unit}"] = steps * row[f"sun_{unit}"] + row[f"{decoder}_{unit}"]
                if f"plain_{unit}" in row:
                    reference = REFERENCE_ROWS * row[f"plain_{unit}"] + row[f"{decoder}_{unit}"]
                    row[f"reference_{decoder}_{unit}"] = reference
        table[kind] = row
    return table


def _inputs(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    side = size // 8

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "sample": draw(1, 4, side, side),
        "timestep": torch.full((1,), 499.0),
        "positive": draw(1, 77, 768),
        "negative": draw(1, 77, 768),
        "strength": torch.tensor(1.0),
    }


def _wanted(inputs: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    plain = ("sample", "timestep", "positive")
    return {key: value for key, value in inputs.items() if name == "sun" or key in plain}


def _timed(call: Callable[[], Any]) -> dict[str, float]:
    """After a call that pays for allocation, the quicker of ``CALLS``."""
    call()
    seconds, processor = [], []
    for _ in range(CALLS):
        began, began_cpu = time.perf_counter(), time.process_time()
        call()
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - began_cpu)
    return {"seconds": min(seconds), "processor_seconds": min(processor)}


def _peak_memory() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
