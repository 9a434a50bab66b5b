"""``sun train``, ``sun train-emoji``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import apply, assign, read_config
from .app import app, emoji_app
from .options import ConfigFile, Minutes, Output, Resume, Settings, Steps
from .show import out


@app.command(
    epilog="""Examples:

sun train --output runs/sun --minutes 30

sun train --model sd15-folder --data pictures/ --batch-size 8 --set guidance_scale=7.5

accelerate launch -m sun train --config sun.toml"""
)
def train(
    config: ConfigFile = None,
    model: Annotated[
        str | None, typer.Option(help="Diffusers folder of the frozen model. (emoji: the shipped one)")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder of pictures and captions, or webdataset shards.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run: checkpoints, samples, adapter.")] = None,
    steps: Annotated[int | None, typer.Option(help="Length in steps.", min=1)] = None,
    minutes: Annotated[float | None, typer.Option(help="Length in minutes, if that ends it sooner.", min=0.0)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures a step and process.", min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume/--no-resume", help="Go on from the run's last checkpoint.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Train a SUN adapter for a frozen Stable Diffusion 1.x model (Algorithm 1 of the paper)."""
    from ..training.sun import SunTrainConfig, train_sun

    given = {"model": model, "data": data}
    run = {"output": output, "steps": steps, "minutes": minutes, "batch_size": batch_size, "lr": lr, "resume": resume}
    out.print(f"adapter: {train_sun(_configured(SunTrainConfig(), config, given, run, settings))}", soft_wrap=True)


@emoji_app.command("vae")
def train_emoji_vae(
    config: ConfigFile = None,
    output: Output = None,
    steps: Steps = None,
    minutes: Minutes = None,
    resume: Resume = None,
    settings: Settings = None,
) -> None:
    """Train its autoencoder (TAESD layout)."""
    from ..emoji.vae import VaeConfig, train_vae

    run = {"output": output, "steps": steps, "minutes": minutes, "resume": resume}
    out.print(f"autoencoder: {train_vae(_configured(VaeConfig(), config, {}, run, settings))}", soft_wrap=True)


@emoji_app.command("base")
def train_emoji_base(
    config: ConfigFile = None,
    output: Output = None,
    steps: Steps = None,
    minutes: Minutes = None,
    resume: Resume = None,
    settings: Settings = None,
) -> None:
    """Train its text encoder and U-Net on a trained autoencoder."""
    from ..emoji.base import BaseConfig, train_base

    run = {"output": output, "steps": steps, "minutes": minutes, "resume": resume}
    out.print(f"model: {train_base(_configured(BaseConfig(), config, {}, run, settings))}", soft_wrap=True)


@emoji_app.command("ship")
def train_emoji_ship(
    base: Annotated[Path | None, typer.Option(help="Folder of a finished `train-emoji base` run.")] = None,
    vae: Annotated[Path | None, typer.Option(help="Folder of its `train-emoji vae` run, for the card.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of a finished `sun train` run.")] = None,
    contrast: Annotated[Path | None, typer.Option(help="Folder of a finished `train-emoji contrast` run.")] = None,
    lora: Annotated[Path | None, typer.Option(help="Folder of a finished `train-emoji lora` run.")] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale of the card's pictures.")] = 4.0,
    notes: Annotated[Path | None, typer.Option(help="Markdown to put at the end of the card.")] = None,
) -> None:
    """Write finished runs into the package, as fp16 with a model card."""
    from ..emoji.ship import ship_adapter, ship_base, ship_folder
    from ..shipped import EMOJI_CONTRAST, EMOJI_DIFFUSION, EMOJI_SUN, MODELS_DIR

    text = notes.read_text() if notes else ""
    if base:
        out.print(f"model: {ship_base(base, EMOJI_DIFFUSION, guidance, text, vae)}", soft_wrap=True)
    if adapter:
        out.print(f"adapter: {ship_adapter(adapter, EMOJI_SUN, text)}", soft_wrap=True)
    if contrast:
        out.print(f"image-text model: {ship_folder(contrast / 'contrast', EMOJI_CONTRAST, text)}", soft_wrap=True)
    if lora:
        out.print(f"LoRA: {ship_folder(lora / 'lora', MODELS_DIR / lora.name, text)}", soft_wrap=True)


def _configured(
    config: Any, file: Path | None, given: dict[str, Any], run: dict[str, Any], settings: list[str] | None
) -> Any:
    """Defaults, then the file, then the options, then ``--set``: the later wins."""
    if file:
        apply(config, read_config(file), str(file))
    apply(config, {k: v for k, v in given.items() if v is not None}, "options")
    if run:
        apply(config.run, {k: v for k, v in run.items() if v is not None}, "options")
    return assign(config, settings or [])
