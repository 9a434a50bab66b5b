"""Where adapters live: `models/sun`, `--sun-dir`, the folder of the settings page, and the one shipped with SUN."""

from __future__ import annotations

import contextlib
from pathlib import Path

from modules import paths, shared

from ..sun.shipped import EMOJI_SUN

SHIPPED = "emoji-sun (shipped with SUN)"  # no file name looks like this, so it can never hide one of the user's
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
    """Every adapter one can choose; the user's first, because the shipped one fits Emoji Diffusion only."""
    return [*files(), SHIPPED]


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
