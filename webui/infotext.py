"""What SUN writes into a picture's infotext, and how it is read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..sun import __version__
from . import store
from .run import SunSettings

ADAPTER = "SUN adapter"
HASH = "SUN adapter hash"
STRENGTH = "SUN strength"
NEGATIVE = "SUN negative prompt"
MAIN_NEGATIVE = "SUN main negative prompt"
DENOISE_MODE = "SUN denoise mode"
SAMPLING = "SUN sampling"
VERSION = "SUN version"

Params = dict[str, Any]


def write(settings: SunSettings, path: Path) -> dict[str, Any]:
    """Entries for p.extra_generation_params. The number of steps is the host's own "Steps"."""
    entries = {
        ADAPTER: settings.adapter,
        HASH: store.short_hash(path),
        STRENGTH: f"{settings.strength:g}",
        DENOISE_MODE: settings.denoise_mode,
        SAMPLING: settings.sampling,
        VERSION: __version__,
    }
    if settings.main_negative:
        return entries | {MAIN_NEGATIVE: "True"}
    return entries | ({NEGATIVE: settings.negative} if settings.negative else {})


def _of_sun(read: Callable[[Params], Any]) -> Callable[[Params], Any]:
    """A reader that leaves the field alone (None) for pictures without SUN."""
    return lambda params: read(params) if ADAPTER in params else None


def enabled(params: Params) -> bool:
    """Pasting a picture made without SUN switches it off."""
    return ADAPTER in params


READERS: dict[str, Callable[[Params], Any]] = {
    "enabled": enabled,
    "adapter": _of_sun(lambda params: params[ADAPTER]),
    "strength": _of_sun(lambda params: float(params.get(STRENGTH, 1.0))),
    "steps": _of_sun(lambda params: int(params.get("Steps", 4))),
    "main_negative": _of_sun(lambda params: MAIN_NEGATIVE in params),
    "negative": _of_sun(lambda params: params.get(NEGATIVE, "")),
    "denoise_mode": _of_sun(lambda params: params.get(DENOISE_MODE, "trained")),
    "sampling": _of_sun(lambda params: params.get(SAMPLING, "sun")),
}
"""A reader for each control of the accordion, by its name."""
