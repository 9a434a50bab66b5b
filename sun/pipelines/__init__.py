"""SUN in diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common import lazy

if TYPE_CHECKING:
    from .unet import GUIDANCE, NEGATIVE, RUN, new_run

__all__ = ["GUIDANCE", "NEGATIVE", "RUN", "new_run"]

__getattr__ = lazy.attributes(__name__, dict.fromkeys(__all__, "unet"))
