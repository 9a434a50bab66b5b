"""Options that several commands share."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..pictures import recipe
from .show import STDOUT, out

MAX_SEED = 2**64 - 1  # torch's


def check_target(path: Path, option: str = "--out") -> Path:
    """``path`` if a file can be written there, so that a wrong name costs no run. Raises BadParameter."""
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; name the file in it", param_hint=option)
    return _check_parent(path, option)


def check_folder(path: Path, option: str = "--out") -> Path:
    """``path`` if it is a folder files can be written to, or can be made one. Raises BadParameter."""
    if path.exists() and not path.is_dir():
        raise typer.BadParameter(f"{path} is a file, and a folder is to be made there", param_hint=option)
    return _check_parent(path / "x", option)


def _check_parent(path: Path, option: str) -> Path:
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise typer.BadParameter(f"{parent} is a file, so there can be no {path}", param_hint=option)
    if not os.access(parent, os.W_OK):
        raise typer.BadParameter(f"{parent} cannot be written to", param_hint=option)
    return path


def read_prompt(text: str) -> str:
    """A prompt; ``-`` is what comes from standard input. Raises BadParameter."""
    if text != STDOUT:
        return text
    try:
        given = sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"standard input is not text ({error.reason} at byte {error.start})") from error
    if not given:
        raise typer.BadParameter("the prompt is -, standard input, and nothing came from there")
    return given


def _json_target(path: Path | None) -> Path | None:
    to_stdout = path is not None and str(path) == STDOUT
    out.stderr = to_stdout  # what people read makes way for what programs read
    return path if path is None or to_stdout else check_target(path, "--json")


class Scheduler(StrEnum):
    """Same names as sun.pipelines.schedulers.SCHEDULERS, which needs diffusers."""

    ddim = "ddim"
    dpmpp_2m = "dpmpp_2m"
    unipc = "unipc"
    euler = "euler"


class DenoiseMode(StrEnum):
    trained = "trained"
    respaced = "respaced"


class PromptWeights(StrEnum):
    none = "none"
    compel = "compel"


class SwitchOrder(StrEnum):
    """Same names as sun.switching.ORDERS, which needs torch."""

    small = "small first"
    large = "large first"


class Ltc(StrEnum):
    """Same names as sun.ltc.presets.NAMES, which needs torch."""

    none = "none"
    fine = "fine"
    balanced = "balanced"
    fast = "fast"
    fastest = "fastest"
    paper = "paper"


class Inherit(StrEnum):
    """Same names as sun.inheritance.PRESETS, which needs torch."""

    none = "none"
    fine = "fine"
    balanced = "balanced"
    fast = "fast"


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
Lora = Annotated[
    list[str] | None,
    typer.Option(help="LoRA as PATH or PATH:WEIGHT, several times if you like. (emoji: the shipped one)"),
]
Negative = Annotated[str, typer.Option(help="What to keep out of the picture.")]
ControlNet = Annotated[
    str,
    typer.Option(
        help="ControlNet: a diffusers folder or a Control-LoRA file. (emoji: the shipped one)", metavar="PATH"
    ),
]
Size = Annotated[str, typer.Option(help="Pixels, as 512 or 512x768. (default: the model's own)")]
Seed = Annotated[
    int | None,
    typer.Option(help="Seed of the first picture; the next use seed + 1, ... (default: random)", min=0, max=MAX_SEED),
]
Strength = Annotated[float, typer.Option("--sun-strength", help="1 is the trained adapter, 0 the plain model.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")]
Precision = Annotated[Dtype, typer.Option(help="Number format; auto is float32 on a CPU and float16 elsewhere.")]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="Write the figures to this file; - is standard output.", callback=_json_target),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting as KEY=VALUE; may be given several times.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML or JSON file with settings.")]


def parse_size(text: str) -> tuple[int, int]:
    """:func:`sun.pictures.recipe.parse_size`, of which this raises the errors as BadParameter."""
    try:
        return recipe.parse_size(text)
    except recipe.RecipeError as error:
        raise typer.BadParameter(str(error).rstrip("."), param_hint="--size") from None


def recipe_of(size: str, lora: list[str] | None, dtype: Dtype, **settings: Any) -> recipe.Recipe:
    """The recipe of a command's options: these three are kept otherwise there. Raises BadParameter."""
    width, height = parse_size(size)
    return recipe.Recipe(width=width, height=height, loras=tuple(lora or ()), dtype=dtype.value, **settings)
