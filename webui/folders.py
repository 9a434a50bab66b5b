"""Where adapters live: `models/sun`, `--sun-dir`, the folder of the settings page, and the one shipped with SUN."""

from __future__ import annotations

import contextlib
import html
from pathlib import Path
from typing import Any

from modules import paths, shared

from ..sun.files import SunFileError, text_width_name
from ..sun.shipped import EMOJI_SUN
from . import store
from .run import base_of

SHIPPED = "emoji-sun (shipped with SUN)"  # no file name looks like this, so it can never hide one of the user's
RELEASED = "sun_adapter_sdv15_4step_addpos.safetensors"
RELEASED_AT = "https://huggingface.co/Williechai/SpeedUpNet/tree/main"
"""Where SUN's authors publish their adapter for Stable Diffusion 1.5."""
SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt"})


def searched() -> list[Path]:
    """The folders, in the order in which they are searched."""
    more = [getattr(shared.cmd_opts, "sun_dir", None), getattr(shared.opts, "sun_folder", None)]
    return [Path(paths.models_path) / "sun", *(Path(folder).expanduser() for folder in more if folder)]


def files() -> dict[str, Path]:
    """Every adapter file by its name in the list (its path inside its folder). The first folder wins a name."""
    with contextlib.suppress(OSError):  # a read-only models folder: the others still work
        searched()[0].mkdir(parents=True, exist_ok=True)
    found: dict[str, Path] = {}
    for folder in searched():
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.suffix.lower() in SUFFIXES and path.is_file():
                found.setdefault(path.relative_to(folder).as_posix(), path)
    return found


def names() -> list[str]:
    """Every adapter one can choose; the user's first, because the shipped one fits Emoji Diffusion only.

    Other models that lie in these folders (a LoRA, say) are left out.
    """
    return [*(name for name, path in files().items() if not store.is_another_model(path)), SHIPPED]


def that_fits(unet: Any) -> str:
    """The first adapter of the list made for a U-Net like this (LDM layout). Raises SunFileError that says where to get
    one, and for a U-Net that is not of Stable Diffusion 1.x."""
    base = base_of(unet, "the loaded model")
    for name in names():
        facts = store.facts(find(name))
        if facts is not None and (facts.channels, facts.text_width) == (base.channels, base.text_width):
            return name
    raise SunFileError(
        f"No SUN adapter here fits the loaded model, whose text width is {text_width_name(base.text_width)}. "
        f"{where_to_get_one(base.text_width)}"
    )


def where_to_get_one(text_width: int) -> str:
    """What to do where no adapter fits a model of this text width."""
    if text_width != 768:
        return f"Put an adapter made for it into {searched()[0]}; `sun train` makes one."
    return (
        f"For Stable Diffusion 1.5 download {RELEASED} of SUN's authors from {RELEASED_AT} and put it into "
        f"{searched()[0]}. Then press the arrows beside the list of adapters and generate again."
    )


def first_steps() -> str:
    """HTML for a user who has no adapter yet; empty for all others."""
    if any(store.facts(path) is not None for path in files().values()):
        return ""
    folder = html.escape(str(searched()[0]))
    return (
        f"<p>No SUN adapter yet. For Stable Diffusion 1.5 download <a href='{RELEASED_AT}' target='_blank' "
        f"rel='noopener'>{RELEASED}</a> of SUN's authors, put it into <code>{folder}</code>, and press the arrows. The "
        "one shipped with SUN fits Emoji Diffusion only.</p>"
    )


def path_of(name: str) -> Path | None:
    """The file behind a name of the list, or None for any other name."""
    try:
        return find(name)
    except FileNotFoundError:
        return None


def find(name: str | None) -> Path:
    """The file behind a name of the list. Raises FileNotFoundError that lists every folder searched."""
    if name == SHIPPED:
        if EMOJI_SUN.is_file():
            return EMOJI_SUN
        raise FileNotFoundError(
            f"The adapter shipped with SUN is missing: {EMOJI_SUN}. Install the SUN extension again."
        )
    # Only listed names are opened: a name from an infotext or the web cannot lead out of the folders.
    path = files().get(str(name))
    if path is None:
        folders = "; ".join(str(folder) for folder in searched())
        raise FileNotFoundError(
            f"No SUN adapter named {name!r} in {folders}. Put the .safetensors file there (or start with --sun-dir) "
            "and press the refresh button beside the list."
        )
    return path
