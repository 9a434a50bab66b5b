"""LTC-Accel and feature inheritance as the accordion, the API and the X/Y/Z plot set them, with or without SUN."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from . import inheritance, ltc
from .choices import AcceleratorSettings


@dataclass
class AcceleratorRun:
    """One run of the host's processing. Lives on the processing object and is dropped with it."""

    settings: AcceleratorSettings
    error: Exception | None = None
    """What is wrong with the settings: hosts swallow exceptions of scripts, so it is raised where they do not."""
    guarded: bool = False
    """Whether the host said that it samples."""

    @property
    def names(self) -> str:
        """What is on, for messages."""
        chosen = self.settings
        return " and ".join(["LTC-Accel"] * chosen.ltc + ["feature inheritance"] * chosen.inherits)

    def sampling(self, p: Any, steps: int) -> list[AbstractContextManager[None]]:
        """What is to be around one sampling of `steps` steps by p.sampler; any order of entering will do."""
        chosen, around = self.settings, list[AbstractContextManager[None]]()
        if chosen.inherits:
            around.append(inheritance.sampling(p, chosen.plan(), steps))
        if chosen.ltc:
            around.append(ltc.sampling(p, chosen.ltc_settings(), chosen.calibration))
        return around
