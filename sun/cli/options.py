"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Scheduler(StrEnum):
    """Same names as sun.pipelines.schedulers.SCHEDULERS, which needs diffusers."""

    ddim = "ddim"
    dpmpp_2m = "dpmpp_2m"
    unipc = "unipc"
    euler = "euler"


class DenoiseMode(StrEnum):
    trained = "trained"
    respaced = "respaced"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Layout(StrEnum):
    sun = "sun"
    official = "official"


Model = Annotated[
    str, typer.Option(help="Diffusers folder or single-file SD 1.5 checkpoint (.safetensors). (emoji: the shipped one)")
]
ConfigDir = Annotated[
    str, typer.Option("--config", help="Diffusers folder that describes an unusual single-file checkpoint.")
]
Adapter = Annotated[str, typer.Option(help="SUN adapter file; none runs the plain model. (emoji: the shipped one)")]
Lora = Annotated[list[str] | None, typer.Option(help="LoRA as PATH or PATH:WEIGHT; may be given several times.")]
Size = Annotated[str, typer.Option(help="Pixels, as 512 or 512x768. (default: the model's own)")]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the first picture; the next use seed + 1, ... (default: random)", min=0)
]
Strength = Annotated[float, typer.Option("--sun-strength", help="1 is the trained adapter, 0 the plain model.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")]
Precision = Annotated[Dtype, typer.Option(help="Number format; auto is float32 on a CPU and float16 elsewhere.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting as KEY=VALUE; may be given several times.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML or JSON file with settings.")]


def parse_size(text: str) -> tuple[int, int]:
    """``512`` or ``512x768`` -> (width, height); empty -> (0, 0), the model's own."""
    if not text:
        return 0, 0
    width, _, height = text.lower().partition("x")
    try:
        sides = int(width), int(height or width)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a size; write 512 or 512x768", param_hint="--size") from None
    if min(sides) < 8 or any(side % 8 for side in sides):
        raise typer.BadParameter(f"{text!r}: both sides must be multiples of 8", param_hint="--size")
    return sides
