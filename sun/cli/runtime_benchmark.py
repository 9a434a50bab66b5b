"""``sun bench-runtimes``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..common.settings import ConfigError
from .app import app
from .options import Json
from .show import out, progress_bar, write_json

_TORCH = ("torch", "torch-compiled")
_KINDS = (*_TORCH, "openvino-fp32", "openvino-fp16", "openvino-int8", "onnx-fp32", "onnx-fp16", "onnx-int8")


@app.command(
    "bench-runtimes",
    epilog="""Examples:

sun bench-runtimes --json runtimes.json

sun bench-runtimes --kinds torch,openvino-int8 --rounds 5""",
)
def bench_runtimes(
    kinds: Annotated[
        str, typer.Option(help=f"What to measure, with commas: {', '.join(_KINDS)}.")
    ] = "torch,openvino-fp32,openvino-int8,onnx-fp32,onnx-int8",
    size: Annotated[int, typer.Option(help="Pixels of the square pictures.")] = 512,
    rounds: Annotated[int, typer.Option(help="Processes of each kind; the figures are medians.", min=1)] = 2,
    threads: Annotated[int, typer.Option(help="Processor threads; 0 is all.", min=0)] = 0,
    folder: Annotated[
        Path | None, typer.Option(help="Where the graphs are written, and found again. (default: removed at the end)")
    ] = None,
    figures: Json = None,
    only: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure a U-Net call with SUN and a 4-step picture in torch, OpenVINO and ONNX Runtime on the CPU.

    Random weights of Stable Diffusion 1.5's size; graphs of 4 to 15 GB are written. Each kind runs in a process of its
    own, in turn. `processor_seconds` add up all threads and depend little on what else the machine does.
    """
    chosen = [kind.strip() for kind in kinds.split(",") if kind.strip()]
    if unknown := [kind for kind in chosen if kind not in _KINDS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: choose of {', '.join(_KINDS)}", param_hint="--kinds")
    if size < 8 or size % 8:
        raise typer.BadParameter(f"{size} is not a multiple of 8", param_hint="--size")
    threads = threads or os.cpu_count() or 1
    if only:
        print(json.dumps(_one_round(only, chosen, folder or Path(), size, threads)))
        return
    with tempfile.TemporaryDirectory(prefix="sun-runtimes-") as scratch:
        place = folder or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        rows = _rounds(chosen, place, size, rounds, threads)
    from ..runtimes.timing import summary

    table = summary(rows)
    out.print(_table(table))
    write_json(figures, {"size": size, "threads": threads, "rounds": rounds, "kinds": table})


def _rounds(kinds: list[str], folder: Path, size: int, rounds: int, threads: int) -> dict[str, list[dict[str, Any]]]:
    exported = [kind for kind in kinds if kind not in _TORCH]
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    with progress_bar("measuring") as progress:
        total = len(kinds) * rounds + 1
        progress(0, total)
        lacking = [kind for kind in exported if not (folder / kind / "sun").is_dir()]
        if lacking:  # in a process of its own: its memory goes before anything is measured
            _child(["--only", "write", "--kinds", ",".join(lacking), "--folder", str(folder)])
        for turn in range(rounds):
            for i, kind in enumerate(kinds):
                progress(1 + turn * len(kinds) + i, total)
                said = _child(["--only", kind, "--folder", str(folder), "--size", str(size), "--threads", str(threads)])
                rows[kind].append(json.loads(said.strip().splitlines()[-1]))
    return rows


def _child(arguments: list[str]) -> str:
    """What this command prints in a process of its own, whose idle threads wait instead of spinning."""
    command = [sys.executable, "-m", "sun", "bench-runtimes", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_WAIT_POLICY": "passive"}, check=False
    )
    if done.returncode:
        raise ConfigError(f"{arguments[1]} could not be measured: {done.stderr.strip()[-400:]}")
    return done.stdout


def _one_round(kind: str, kinds: list[str], folder: Path, size: int, threads: int) -> dict[str, Any]:
    from ..runtimes import engines, timing
    from ..surgery import from_unet
    from ..training.cost.benchmark import models_of

    if kind not in (*_TORCH, "write"):
        runtime, weights = kind.split("-")
        engines.require(runtime)
        return timing.measure_graphs(folder, runtime, weights, size, threads)
    models = models_of("sd15")
    adapter = from_unet(models.unet, positive=True)
    if kind == "write":
        return _write(kinds, folder, models, adapter)
    return timing.measure_torch(models, adapter, kind == "torch-compiled", size, threads)


def _write(kinds: list[str], folder: Path, models: Any, adapter: Any) -> dict[str, Any]:
    from ..runtimes import engines, timing

    wanted = [(runtime, weights) for runtime, _, weights in (kind.partition("-") for kind in kinds)]
    for runtime, weights in wanted:
        engines.require(runtime, writing=True, weights=weights)
    timing.write_graphs(models, adapter, folder, wanted)
    return {}


def _table(found: dict[str, dict[str, float]]) -> Table:
    heads = {
        "sun_seconds": "call, s",
        "sun_processor_seconds": "processor s",
        "sun_ratio_processor_seconds": "to plain",
        "picture_full_seconds": "4 steps, s",
        "picture_tiny_seconds": "TAESD, s",
        "reference_full_seconds": "25 with CFG, s",
        "memory_gib": "GiB",
    }
    table = Table("", title="a U-Net call with SUN, and a picture")
    for head in heads.values():
        table.add_column(head, justify="right")
    for kind, row in found.items():
        table.add_row(kind, *(f"{row[key]:.3g}" if key in row else "" for key in heads))
    return table
