"""What a picture depends on, as one record: kept in the PNG, read back to make the same picture again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..common.identity import fingerprint
from ..common.reading import ReadError, check_regular, parse_json, printable
from ..shipped import EMOJI_DIFFUSION, EMOJI_LORA, EMOJI_SUN, SHIPPED
from ..switching import ORDERS, SMALL_FIRST
from ..user_pictures import PictureError
from .png import read_png_text

FORMAT = "sun-picture-1"
CHUNK = "sun"
INSIDE = "inside"
"""As adapter or controlnet: the one that an exported model has in it."""
# DDIM with eta 0 is Euler in the sigma space other programs sample in; their "Simple" schedule has our timesteps.
_A1111_SAMPLERS = {"ddim": "Euler", "euler": "Euler", "dpmpp_2m": "DPM++ 2M", "unipc": "UniPC"}
MAX_SIDE = 4096
MAX_PIXELS = 2**26
"""Of all pictures of a batch together: 256 of 512 x 512, or 4 of 4096 x 4096."""
# (smallest, largest) of every number; None besides where the field says so.
_WHOLE = {
    "steps": (1, 1000),
    "seed": (0, 2**64 - 1),
    "batch": (1, 1024),
    "index": (0, 1023),
    "width": (0, MAX_SIDE),
    "height": (0, MAX_SIDE),
}
_NUMBERS = {
    "sun_strength": (-10, 10),
    "guidance": (0, 1000),
    "strength": (0, 1),
    "control_scale": (-10, 10),
    "share": (0, 1),
}
_OPTIONAL = ("index", "guidance", "strength")
_WORDS = {
    "scheduler": tuple(_A1111_SAMPLERS),
    "denoise_mode": ("trained", "respaced"),
    "dtype": ("auto", "float32", "float16", "bfloat16"),
    "switch_order": ORDERS,
    "prompt_weights": ("none", "compel"),
    # As in sun.ltc.presets and sun.inheritance, which need torch.
    "ltc": ("none", "fine", "balanced", "fast", "fastest", "paper"),
    "inherit": ("none", "fine", "balanced", "fast"),
}
_PATHS = ("model", "config", "adapter", "controlnet", "init", "mask", "control", "switch", "ltc_table")
_LONGEST_TEXT, _LONGEST_PATH, _MOST_LORAS = 100_000, 4096, 64


class RecipeError(ValueError):
    """A setting or file that cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class Recipe:
    """Settings of one run. Picture ``i`` of the batch starts from the noise of ``seed + i``.

    Raises RecipeError unless every value is of its type and within its bounds.
    """

    prompt: str = ""
    negative: str = ""
    steps: int = 4
    prompt_weights: str = "none"
    """Who reads weights in both prompts: ``compel``, as (red)1.3, or nobody: then they are words."""
    seed: int = 0
    batch: int = 1
    index: int | None = None
    """Which picture of the batch this is; None: all of them."""
    width: int = 0
    height: int = 0
    """Pixels; 0 is the model's own size, or that of ``init``."""
    scheduler: str = "ddim"
    sun_strength: float = 1.0
    guidance: float | None = None
    """Guidance scale of runs without an adapter (None: 7.5, of the shipped model its own) and of adapters that take one
    (None: their own)."""
    init: str = ""
    strength: float | None = None
    """How much of ``init`` is repainted, 0 to 1; None: 0.5, or 1 under a mask."""
    mask: str = ""
    denoise_mode: str = "trained"
    control: str = ""
    control_scale: float = 1.0
    controlnet: str = ""
    """A diffusers folder, or ``emoji``: the shipped one."""
    model: str = SHIPPED
    config: str = ""
    adapter: str = SHIPPED
    loras: tuple[str, ...] = ()
    """Each ``path`` or ``path:weight``."""
    switch: str = ""
    """A model whose U-Net makes a ``share`` of the steps, the first ones or the last ones."""
    share: float = 0.4
    switch_order: str = SMALL_FIRST
    ltc: str = "none"
    """Preset of LTC-Accel; ``paper`` with a table of its own."""
    ltc_table: str = ""
    inherit: str = "none"
    """Preset of feature inheritance."""
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in _WHOLE:
            _check_number(self, name, _WHOLE[name], int)
        for name in _NUMBERS:
            _check_number(self, name, _NUMBERS[name], (int, float))
        for name in ("prompt", "negative", *_PATHS):
            _check_text(name, getattr(self, name), _LONGEST_PATH if name in _PATHS else _LONGEST_TEXT)
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise RecipeError(
                    f"the {name.replace('_', ' ')} {_shown(getattr(self, name))} is unknown. "
                    f"Choose one of {', '.join(words)}."
                )
        if not isinstance(self.device, str) or not re.fullmatch(r"(?!meta)[a-z]{2,20}(:\d{1,3})?", self.device):
            raise RecipeError(f"the device {_shown(self.device)} is none. Choose cpu, cuda, cuda:1, mps or auto.")
        if not isinstance(self.loras, tuple) or len(self.loras) > _MOST_LORAS:
            raise RecipeError(f"loras = {_shown(self.loras)} is no list of at most {_MOST_LORAS} files.")
        for lora in self.loras:
            _check_text("lora", lora, _LONGEST_PATH)
            if not math.isfinite(split_lora(lora)[1]):
                raise RecipeError(f"the LoRA {_shown(lora)} has no finite weight.")
        self._check_sizes()

    def _check_sizes(self) -> None:
        if self.width % 8 or self.height % 8:
            raise RecipeError(f"the size {self.width}x{self.height} is impossible. Both sides must be multiples of 8.")
        if self.batch * self.width * self.height > MAX_PIXELS:
            raise RecipeError(
                f"{self.batch} pictures of {self.width}x{self.height} are more than the {MAX_PIXELS:,} pixels that one "
                "run makes. Take a smaller batch or size."
            )
        if self.index is not None and self.index >= self.batch:
            raise RecipeError(f"picture {self.index} (from 0) is not in a batch of {self.batch}.")
        if self.seed + self.batch > 2**64:
            raise RecipeError(f"seed {self.seed} leaves no seeds for a batch of {self.batch}: they have 64 bits.")

    def files(self) -> dict[str, str]:
        """The files and folders named here, by the field that names them."""
        named = {"init": self.init, "mask": self.mask, "control": self.control}
        named |= {"controlnet": "" if self.controlnet in (SHIPPED, INSIDE) else self.controlnet}
        named |= {"model": "" if self.model == SHIPPED else self.model}
        named |= {"config": self.config, "switch": self.switch, "ltc_table": self.ltc_table}
        named |= {"adapter": "" if self.adapter in (SHIPPED, INSIDE, "none") else self.adapter}
        named |= {field: path for field, path in self.lora_files().items() if path != SHIPPED}
        return {field: path for field, path in named.items() if path}

    def lora_files(self) -> dict[str, str]:
        """The LoRAs as they are named here, by the field that names them."""
        return {f"lora {i}": split_lora(lora)[0] for i, lora in enumerate(self.loras)}


def parse_size(text: str) -> tuple[int, int]:
    """``512`` or ``512x768`` -> (width, height); empty -> (0, 0), the model's own. Raises RecipeError."""
    if not text:
        return 0, 0
    if not (match := re.fullmatch(r"\s*(\d{1,9})\s*(?:[xX×]\s*(\d{1,9}))?\s*", text)):
        raise RecipeError(f"{_shown(text)} is not a size; write 512 or 512x768.")
    sides = int(match[1]), int(match[2] or match[1])
    if min(sides) < 8 or any(side % 8 for side in sides):
        raise RecipeError(f"{_shown(text)}: both sides must be multiples of 8.")
    return sides


def split_lora(text: str) -> tuple[str, float]:
    """``path:weight`` -> (path, weight); the weight is 1 when there is none."""
    path, colon, weight = text.rpartition(":")
    if colon:
        try:
            return path, float(weight)
        except ValueError:
            pass  # the colon of C:\...
    return text, 1.0


def fingerprints(files: Mapping[str, str]) -> dict[str, str]:
    """:func:`~sun.common.identity.fingerprint` of each file or model folder, by the field that names it.

    Raises RecipeError as :func:`check_files`, before anything is read.
    """
    check_files(files)
    try:
        return {field: fingerprint(path) for field, path in files.items()}
    except (ReadError, OSError) as error:
        raise RecipeError(f"a file of the recipe cannot be read: {error}") from error


def check_files(files: Mapping[str, str]) -> None:
    """Raises RecipeError for what is not there or cannot be what the field names. Reads nothing."""
    for field, path in files.items():
        _check_file(field, path)


def _check_file(field: str, path: str) -> None:
    option = f"--{field.split()[0].replace('_', '-')}"  # "lora 0" is given with --lora
    shown = printable(path)
    model = ["model_index.json"]
    marks = {
        "model": [*model, "sun_export.json"],
        "config": model,
        "controlnet": ["config.json"],
        "switch": [*model, "config.json"],
    }
    marks |= {"lora": ["*.safetensors", "*.bin"]}
    marked = marks.get(field.split()[0], [])
    try:
        if not Path(path).exists():
            raise RecipeError(
                f"the picture was made with {shown} ({field}), which is not there. "
                f"Put it back, or name it with {option}."
            )
        if not Path(path).is_dir():
            check_regular(path)
        elif not any(next(Path(path).glob(mark), None) for mark in marked):
            without = f" without {' or '.join(marked)}" if marked else ""
            raise RecipeError(f"{shown} ({field}) is a folder{without}. Give another with {option}.")
    except RecipeError:
        raise
    except ReadError as error:
        raise RecipeError(f"{error} ({field}; give another with {option})") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{shown} ({field}) cannot be read: {getattr(error, 'strerror', '') or error}.") from error


def png_text(recipe: Recipe, index: int, environment: Mapping[str, str], prints: Mapping[str, str]) -> dict[str, str]:
    """The text chunks of picture ``index``: ``parameters`` for other programs and people, ``sun`` for us.

    ``environment``: versions and device it was made with; ``prints``: :func:`fingerprint` of each file by its field.
    """
    mine = replace(recipe, index=index)
    content = {"format": FORMAT, "recipe": asdict(mine), "files": dict(prints), "made_with": dict(environment)}
    return {"parameters": parameters(mine, prints, environment.get("sun", "")), CHUNK: json.dumps(content)}


def parameters(recipe: Recipe, prints: Mapping[str, str] | None = None, version: str = "") -> str:
    """The settings in the text form Stable Diffusion web UIs write and read."""
    prints = prints or {}
    with_sun = recipe.adapter != "none"
    pairs: dict[str, Any] = {
        "Steps": recipe.steps,
        "Sampler": _A1111_SAMPLERS[recipe.scheduler],
        "Schedule type": "Simple",
        "CFG scale": 1 if with_sun and recipe.guidance is None else recipe.guidance,
        "Seed": recipe.seed + (recipe.index or 0),
        "Size": f"{recipe.width}x{recipe.height}",
        "Model": EMOJI_DIFFUSION.name if recipe.model == SHIPPED else Path(recipe.model).stem,
    }
    if recipe.init:
        pairs["Denoising strength"] = recipe.strength
    if with_sun:
        stems = {SHIPPED: EMOJI_SUN.stem, INSIDE: f"in {Path(recipe.model).name}"}
        pairs["SUN adapter"] = stems.get(recipe.adapter) or Path(recipe.adapter).stem
        if "adapter" in prints:
            pairs["SUN adapter hash"] = prints["adapter"][:10]
        pairs["SUN strength"] = recipe.sun_strength
    pairs["Version"] = f"SUN {version}".strip()
    if recipe.switch:
        pairs["Switching model"] = Path(recipe.switch).stem
        pairs["Switching share"], pairs["Switching order"] = recipe.share, recipe.switch_order
    pairs |= {"LTC-Accel": recipe.ltc} if recipe.ltc != "none" else {}
    pairs |= {"Feature inheritance": recipe.inherit} if recipe.inherit != "none" else {}
    loras = [(EMOJI_LORA if path == SHIPPED else Path(path), weight) for path, weight in map(split_lora, recipe.loras)]
    words = "".join(f" <lora:{path.stem}:{weight:g}>" for path, weight in loras)
    lines = [recipe.prompt + words]
    if recipe.negative:
        lines.append(f"Negative prompt: {recipe.negative}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items()))
    return "\n".join(lines)


def read_recipe(path: str | Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe in a PNG and the rest of its chunk (``files``, ``made_with``). Raises RecipeError."""
    try:
        text = read_png_text(path)
    except PictureError as error:
        raise RecipeError(f"{error} A recipe is in a PNG made by `sun generate`.") from error
    if CHUNK not in text:
        raise RecipeError(
            f"{path} holds no SUN recipe. Give a PNG made by `sun generate` that no other program rewrote."
        )
    damaged = f"{printable(str(path))}: its SUN recipe is damaged"
    try:
        content = parse_json(text[CHUNK], "it")
        if content["format"] != FORMAT:
            raise RecipeError(
                f"{printable(str(path))} has recipe format {_shown(content['format'])}; this version reads {FORMAT}. "
                "Update SUN."
            )
        known = {f.name for f in fields(Recipe)}
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in content["recipe"].items() if k in known
        }
        rest = {name: _texts(content.get(name, {})) for name in ("files", "made_with")}
    except ReadError as error:
        raise RecipeError(f"{damaged}: {error} Get the original picture.") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{damaged} ({_shown(error)}). Get the original picture.") from error
    try:
        recipe = Recipe(**values)
    except RecipeError as error:
        raise RecipeError(f"{damaged}: {error} Get the original picture.") from error
    for field, named in recipe.files().items():
        if named.replace("\\", "/").startswith("//") or "://" in named:
            raise RecipeError(
                f"{damaged}: it names {_shown(named)} ({field}), which is on another machine. "
                "Get it, and give it as an option."
            )
    return recipe, rest


def _texts(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise TypeError(f"{_shown(value)} holds no names with texts")
    return value


def _check_number(recipe: Recipe, name: str, bounds: tuple[int, int], kinds: Any) -> None:
    value, (low, high) = getattr(recipe, name), bounds
    if value is None and name in _OPTIONAL:
        return
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "whole number" if kinds is int else "number"
        raise RecipeError(f"{name.replace('_', ' ')} = {_shown(value)} is not a {kind} from {low} to {high}.")


def _check_text(name: str, value: Any, longest: int) -> None:
    if not isinstance(value, str) or len(value) > longest:
        raise RecipeError(f"{name} = {_shown(value)} is no text of at most {longest:,} characters.")
    if re.search("[\0\ud800-\udfff]", value):
        raise RecipeError(f"{name} = {_shown(value)} holds characters that are none.")


def _shown(value: Any) -> str:
    """A value from elsewhere, fit for one line."""
    text = printable(repr(value))
    return text if len(text) <= 80 else text[:80] + "..."


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text) if any(c in text for c in ',:\n"') else text
