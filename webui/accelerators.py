"""LTC-Accel, feature inheritance and switching as the accordion, the API and the X/Y/Z plot set them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ..sun.ltc.keep import UNUSED
from . import inheritance, ltc, switching
from .choices import AcceleratorSettings
from .hosts import family


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
        names = {"LTC-Accel": chosen.ltc, "feature inheritance": chosen.inherits, "switching": chosen.switches}
        return " and ".join(name for name, on in names.items() if on)

    def sampling(self, p: Any, steps: int) -> list[AbstractContextManager[None]]:
        """What is to be around one sampling of `steps` steps by p.sampler; any order of entering will do."""
        chosen, around = self.settings, list[AbstractContextManager[None]]()
        unets = [(family.of(p.sd_model).unet_of(p.sd_model), steps)]
        p.sun_switching = None
        if chosen.switches:
            both = p.sun_switching = switching.of(p, chosen.switching(), chosen.switch)
            unets = list(zip(both.unets, both.steps_of(steps), strict=True))
            around.append(switching.sampling(p, both))
        if chosen.inherits:
            around += [inheritance.sampling(unet, chosen.plan(), own) for unet, own in unets if own]
        if chosen.ltc:
            if without_effect := chosen.unused():
                p.comment(UNUSED.format(without_effect))
            around.append(ltc.sampling(p, chosen.ltc_settings(), chosen.calibration))
        return around
