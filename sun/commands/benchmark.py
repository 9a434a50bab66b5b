"""``sun train-benchmark``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..config import configured
from .app import app
from .options import ConfigFile, Json, Settings
from .show import out, write_json


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
    settings: Settings = None,
    figures: Json = None,
) -> None:
    """Measure memory and pictures a second of SUN training, for a configuration of `sun train`."""
    from ..training.benchmark import measure
    from ..training.estimate import estimate as compute
    from ..training.sun import SunTrainConfig, check_settings

    chosen = configured(SunTrainConfig(), config, {}, {}, settings)
    check_settings(chosen)
    if estimate and model != "sd15":
        raise typer.BadParameter("the estimate is of SD 1.5's size; leave --model out", param_hint="--model")
    result = compute(chosen) if estimate else measure(chosen, model, updates)
    for name, value in result.items():
        out.print(f"{name:>22}  {value}", soft_wrap=True)
    write_json(figures, result)
