"""``sun bench``, ``sun bench-compact``, ``sun train-benchmark``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..common.settings import configured
from ..shipped import SHIPPED
from .app import app
from .options import ConfigFile, Dtype, Json, Precision, Settings
from .show import err, out, progress_bar, write_json


@app.command(
    epilog="""Examples:

sun bench --json bench.json

sun bench --batch 1 --rounds 5

sun bench --emoji --compile"""
)
def bench(
    size: Annotated[int, typer.Option(help="Pixels of the square pictures. (default: 512, with --emoji 128)")] = 0,
    batch: Annotated[str, typer.Option(help="Pictures a call; a case for each.")] = "1,4",
    emoji: Annotated[
        bool, typer.Option("--emoji", help="Measure the shipped small model, not one of Stable Diffusion 1.5's size.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Steps of a SUN run.", min=1, max=50)] = 4,
    rounds: Annotated[int, typer.Option(help="Runs of each kind; the figures are medians over them.", min=1)] = 3,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, mps, several with commas, or all: an accelerator if there is one, then cpu.")
    ] = "all",
    dtype: Precision = Dtype.auto,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Also with torch.compile. (default: on accelerators; on a CPU compiling takes minutes)",
        ),
    ] = None,
    figures: Json = None,
) -> None:
    """Measure what SUN costs and gains: a U-Net call with SUN against the plain U-Net's, and the speed-up.

    Both calls run in turn in this process, on random weights of Stable Diffusion 1.5's size (nothing is downloaded).
    `unet_call_ratio` is 1.02 where SUN costs 2 %. The speed-ups are over DPM-Solver++ with 25 steps and guidance (two
    rows a call): 12.5 would be a U-Net call with SUN that costs nothing more. --json is rewritten after each case, so
    a long run may be stopped.
    """
    from ..evaluation.overhead import summary

    pixels, devices = size or (128 if emoji else 512), _devices(device)
    if pixels < 8 or pixels % 8:
        raise typer.BadParameter(f"{pixels} is not a multiple of 8", param_hint="--size")
    report = _measure(_cases(devices, compiled, _counts(batch)), emoji, pixels, dtype, steps, rounds, figures)
    out.print(_bench_table(report))
    top = summary(report)
    for key in ("unet_call_ratio", "unet_speedup", "unet_speedup_limit", "pipeline_speedup"):
        if key in top:
            out.print(f"{key:>20}  {top[key]:.3f}")
    for name, row in report.items():
        if "error" in row:
            err.print(f"[yellow]{name}:[/yellow] {escape(row['error'])}", soft_wrap=True)


def _cases(devices: list[str], compiled: bool | None, counts: list[int]) -> list[Any]:
    """What to measure. compiled: whether also with torch.compile; None: on accelerators."""
    from ..evaluation.overhead import Case

    return [
        Case(place, compile_it, count)
        for place in devices
        for compile_it in (False, True)
        if not compile_it or (place != "cpu" if compiled is None else compiled)
        for count in counts
    ]


def _measure(
    cases: list[Any], emoji: bool, pixels: int, dtype: Dtype, steps: int, rounds: int, figures: Path | None
) -> dict[str, Any]:
    """The figures of each case, written to ``figures`` after each."""
    from ..common.devices import pick_dtype
    from ..evaluation.overhead import Bench, summary
    from ..pictures.draw import load_adapter
    from ..training.cost.benchmark import models_of

    models = models_of(SHIPPED if emoji else "sd15")
    report: dict[str, Any] = {}
    with progress_bar("measuring") as progress:
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            progress(done, len(cases) * rounds)

        progress(0, len(cases) * rounds)
        for case in cases:
            adapter = load_adapter(SHIPPED) if emoji else _random_adapter(models.unet)
            chosen = Bench(models, adapter, pixels, pick_dtype(dtype.value, case.device), steps)
            report[str(case)] = chosen.measure(case, rounds, advance)
            write_json(figures, summary(report), last=case is cases[-1])
    return report


def _random_adapter(unet: Any) -> Any:
    from ..surgery import from_unet

    return from_unet(unet, positive=True)  # both branches, as the authors' file


def _devices(text: str) -> list[str]:
    from ..common.devices import accelerators, pick_device

    if text == "all":
        return [*accelerators()[:1], "cpu"]
    return [pick_device(name.strip()) for name in text.split(",") if name.strip()]


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise typer.BadParameter(f"{text!r}: write pictures a call as 1 or 1,4", param_hint="--batch")
    return counts


def _bench_table(report: dict[str, dict[str, Any]]) -> Table:
    table = Table("case", title="a U-Net call with SUN against the plain U-Net's")
    heads = {
        "plain_call_seconds": "plain, s",
        "sun_call_seconds": "SUN, s",
        "unet_call_ratio": "ratio",
        "first_call_ratio": "first call",
        "unet_speedup": "U-Net x",
        "pipeline_speedup": "pipeline x",
    }
    for head in heads.values():
        table.add_column(head, justify="right")
    for name, row in report.items():
        table.add_row(name, *(f"{row[key]:.4g}" if key in row else "" for key in heads))
    return table


@app.command(
    "bench-compact",
    epilog="""Examples:

sun bench-compact

sun bench-compact --plans "pair.0.1, shallow, shallow+experts, plan.json" --rounds 5 --json compact.json""",
)
def bench_compact(
    plans: Annotated[
        str,
        typer.Option(
            help="What to measure, with commas: lists, plans' files or parts (pair.0.1 pair.1.1); +experts behind one."
        ),
    ] = "pair.0.1,shallow,shallow+experts,bk-base",
    size: Annotated[int, typer.Option(help="Pixels of the square pictures. (default: 512, with --emoji 128)")] = 0,
    batch: Annotated[int, typer.Option(help="Pictures a call, of two rows each.", min=1)] = 1,
    emoji: Annotated[
        bool, typer.Option("--emoji", help="Measure the shipped small model, not one of Stable Diffusion 1.5's size.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Calls of each; the figures are medians over them.", min=1)] = 3,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.")] = "auto",
    dtype: Precision = Dtype.auto,
    figures: Json = None,
) -> None:
    """Measure a U-Net call of compact U-Nets beside the original's, each with the two rows of guidance.

    All take turns in this process, on random weights of Stable Diffusion 1.5's size (nothing is downloaded). Experts
    are untrained, which costs what trained ones cost.
    """
    import torch

    from ..common.devices import pick_device, pick_dtype
    from ..evaluation.compact_speed import candidates, measure
    from ..training.cost.benchmark import models_of

    pixels, place = size or (128 if emoji else 512), pick_device(device)
    if pixels < 64 or pixels % 64:
        raise typer.BadParameter(f"{pixels} is not a multiple of 64", param_hint="--size")
    unet = models_of(SHIPPED if emoji else "sd15").unet.requires_grad_(False).eval()
    torch.nn.Module.to(unet, place, pick_dtype(dtype.value, place))  # diffusers' own warns of every cast
    compact = candidates(unet, [name.strip() for name in plans.split(",") if name.strip()])
    calls, done = (rounds + 1) * (len(compact) + 1), 0
    with progress_bar("measuring") as progress:

        def advance() -> None:
            nonlocal done
            done += 1
            progress(done, calls)

        progress(0, calls)
        found = measure(unet, compact, pixels // 8, batch, rounds, advance)
    write_json(figures, found)
    table = Table("U-Net", title="a call with guidance's two rows a picture")
    for head in ("s", "times as fast", "in arithmetic"):
        table.add_column(head, justify="right")
    for name, row in found["unets"].items():
        table.add_row(name, *(f"{row[key]:.4g}" for key in ("seconds", "speedup", "speedup_in_arithmetic")))
    out.print(table)


@app.command(
    "train-benchmark",
    epilog="""Examples:

sun train-benchmark --config configs/sd15-24gb.toml

sun train-benchmark --config configs/sd15-24gb.toml --estimate --set batch_size=2

accelerate launch --num_processes 4 -m sun train-benchmark --config configs/sd15-4xa100.toml --json figures.json""",
)
def train_benchmark(
    config: ConfigFile = None,
    model: Annotated[
        str, typer.Option(help="sd15: full size, random weights; or a diffusers folder, or emoji.")
    ] = "sd15",
    updates: Annotated[int, typer.Option(help="Updates to time, after two to warm up.", min=1)] = 5,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Compute memory and arithmetic without running (any machine).")
    ] = False,
    compact: Annotated[
        bool, typer.Option("--compact", help="The configuration is one of `sun train-compact`; with --estimate.")
    ] = False,
    settings: Settings = None,
    figures: Json = None,
) -> None:
    """Measure memory and pictures a second of SUN training, for a configuration of `sun train`."""
    if compact:
        _estimate_compact(config, settings, figures, estimate)
        return
    from ..training.config import SunTrainConfig, check_settings
    from ..training.cost.benchmark import measure
    from ..training.cost.estimate import estimate as compute

    chosen = configured(SunTrainConfig(), config, {}, {}, settings)
    check_settings(chosen)
    if estimate and model != "sd15":
        raise typer.BadParameter("the estimate is of SD 1.5's size; leave --model out", param_hint="--model")
    result = compute(chosen) if estimate else measure(chosen, model, updates)
    for name, value in result.items():
        out.print(f"{name:>22}  {value}", soft_wrap=True)
    write_json(figures, result)


def _estimate_compact(config: Any, settings: Any, figures: Any, estimate: bool) -> None:
    from ..training.compact.settings import CompactTrainConfig, check_compact
    from ..training.cost.distilling import estimate_compact

    if not estimate:
        raise typer.BadParameter("what compact U-Nets cost is computed alone: add --estimate", param_hint="--compact")
    chosen = configured(CompactTrainConfig(), config, {}, {}, settings)
    check_compact(chosen)
    result = estimate_compact(chosen)
    for name, value in result.items():
        out.print(f"{name:>22}  {value}", soft_wrap=True)
    write_json(figures, result)
