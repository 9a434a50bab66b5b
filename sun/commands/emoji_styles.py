"""``sun train-emoji contrast``, ``style`` and ``lora``: what Emoji Diffusion is judged by, and its other styles."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import emoji_app
from .options import ConfigFile, Minutes, Output, Resume, Settings, Steps
from .show import out
from .training import _configured

Style = Annotated[str | None, typer.Option(help="openmoji, fluent, google or twemoji.")]
BaseModel = Annotated[
    str | None, typer.Option("--model", help="Diffusers folder to start from. (emoji: the shipped one)")
]


@emoji_app.command("contrast")
def train_emoji_contrast(
    config: ConfigFile = None,
    output: Output = None,
    steps: Steps = None,
    minutes: Minutes = None,
    resume: Resume = None,
    settings: Settings = None,
) -> None:
    """Train the image-text model that evaluation judges its pictures by, on all styles."""
    from ..emoji.contrast_training import ContrastConfig, train_contrast

    run = {"output": output, "steps": steps, "minutes": minutes, "resume": resume}
    folder = train_contrast(_configured(ContrastConfig(), config, {}, run, settings))
    out.print(f"image-text model: {folder}", soft_wrap=True)


@emoji_app.command(
    "style",
    epilog="""Example:

sun train-emoji style --style fluent --config configs/emoji-style.toml""",
)
def train_emoji_style(
    style: Style = None,
    config: ConfigFile = None,
    model: BaseModel = None,
    output: Output = None,
    steps: Steps = None,
    minutes: Minutes = None,
    resume: Resume = None,
    settings: Settings = None,
) -> None:
    """Fine-tune its whole U-Net on another style of emoji."""
    from ..emoji.style import StyleConfig, train_style

    run = {"output": output, "steps": steps, "minutes": minutes, "resume": resume}
    folder = train_style(_configured(StyleConfig(), config, {"style": style, "model": model}, run, settings))
    out.print(f"model: {folder}", soft_wrap=True)


@emoji_app.command(
    "lora",
    epilog="""Example:

sun train-emoji lora --style google --config configs/emoji-lora.toml""",
)
def train_emoji_lora(
    style: Style = None,
    config: ConfigFile = None,
    model: BaseModel = None,
    output: Output = None,
    steps: Steps = None,
    minutes: Minutes = None,
    resume: Resume = None,
    settings: Settings = None,
) -> None:
    """Train a LoRA of another style of emoji, for diffusers, ComfyUI and A1111."""
    from ..emoji.style import LoraStyleConfig, train_lora

    run = {"output": output, "steps": steps, "minutes": minutes, "resume": resume}
    folder = train_lora(_configured(LoraStyleConfig(), config, {"style": style, "model": model}, run, settings))
    out.print(f"LoRA: {folder}", soft_wrap=True)
