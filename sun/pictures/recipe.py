"""What a picture depends on, as one record: kept in the PNG, read back to make the same picture again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..user_pictures import PictureError
from .png import read_png_text

FORMAT = "sun-picture-1"
CHUNK = "sun"
# DDIM with eta 0 is Euler in the sigma space other programs sample in; their "Simple" schedule has our timesteps.
_A1111_SAMPLERS = {"ddim": "Euler", "euler": "Euler", "dpmpp_2m": "DPM++ 2M", "unipc": "UniPC"}
_WHOLE_FILE = 256 * 2**20


class RecipeError(ValueError):
    """A setting or file that cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class Recipe:
    """Settings of one run. Picture ``i`` of the batch starts from the noise of ``seed + i``."""

    prompt: str = ""
    negative: str = ""
    steps: int = 4
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
    """Guidance scale of runs without an adapter (None: 7.5) and of adapters that take one (None: their own)."""
    init: str = ""
    strength: float | None = None
    """How much of ``init`` is repainted, 0 to 1; None: 0.5, or 1 under a mask."""
    mask: str = ""
    denoise_mode: str = "trained"
    control: str = ""
    control_scale: float = 1.0
    controlnet: str = ""
    """A diffusers folder, or ``emoji``: the shipped one."""
    model: str = "emoji"
    config: str = ""
    adapter: str = "emoji"
    loras: tuple[str, ...] = ()
    """Each ``path`` or ``path:weight``."""
    dtype: str = "auto"
    device: str = "auto"

    def files(self) -> dict[str, str]:
        """The files and folders named here, by the field that names them."""
        named = {"init": self.init, "mask": self.mask, "control": self.control}
        named |= {"controlnet": "" if self.controlnet == "emoji" else self.controlnet}
        named |= {"model": "" if self.model == "emoji" else self.model}
        named |= {"adapter": "" if self.adapter in ("emoji", "none") else self.adapter}
        named |= {f"lora {i}": split_lora(lora)[0] for i, lora in enumerate(self.loras)}
        return {field: path for field, path in named.items() if path}


def split_lora(text: str) -> tuple[str, float]:
    """``path:weight`` -> (path, weight); the weight is 1 when there is none."""
    path, colon, weight = text.rpartition(":")
    if colon:
        try:
            return path, float(weight)
        except ValueError:
            pass  # the colon of C:\...
    return text, 1.0


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file, or of a folder's files; of a large file its size, head and tail, to stay quick."""
    path = Path(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        size = file.stat().st_size
        if path.is_dir():
            digest.update(f"{file.relative_to(path).as_posix()}\0{size}\0".encode())
        with file.open("rb") as handle:
            if size <= _WHOLE_FILE:
                while block := handle.read(2**20):
                    digest.update(block)
            else:
                digest.update(str(size).encode() + handle.read(2**24))
                handle.seek(-(2**24), 2)
                digest.update(handle.read())
    return digest.hexdigest()


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
        "Model": "emoji-diffusion" if recipe.model == "emoji" else Path(recipe.model).stem,
    }
    if recipe.init:
        pairs["Denoising strength"] = recipe.strength
    if with_sun:
        pairs["SUN adapter"] = "emoji-sun" if recipe.adapter == "emoji" else Path(recipe.adapter).stem
        if "adapter" in prints:
            pairs["SUN adapter hash"] = prints["adapter"][:10]
        pairs["SUN strength"] = recipe.sun_strength
    pairs["Version"] = f"SUN {version}".strip()
    words = "".join(f" <lora:{Path(p).stem}:{w:g}>" for p, w in map(split_lora, recipe.loras))
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
    try:
        content = json.loads(text[CHUNK])
        if content["format"] != FORMAT:
            raise RecipeError(
                f"{path} has recipe format {content['format']!r}; this version reads {FORMAT}. Update SUN."
            )
        known = {f.name for f in fields(Recipe)}
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in content["recipe"].items() if k in known
        }
        return Recipe(**values), content
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise RecipeError(f"{path}: its SUN recipe is damaged ({error!r}). Get the original picture.") from error


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text) if any(c in text for c in ',:\n"') else text
