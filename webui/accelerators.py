"""LTC-Accel and feature inheritance as the accordion, the API and the X/Y/Z plot set them, with or without SUN."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ..sun.inheritance import Plan, parse_plan
from ..sun.ltc import LtcError, LtcSettings
from ..sun.ltc.keep import AGAIN, AUTOMATIC
from . import inheritance, ltc

OFF = "off"
CALIBRATIONS = [AUTOMATIC, AGAIN]


@dataclass(frozen=True)
class AcceleratorSettings:
    """What the section "without training" says; both are off by default.

    ltc: skip steps. tau: radians. calibration: one of CALIBRATIONS. inherit: off, a preset, or a plan in words.
    """

    ltc: bool = False
    tau: float = 0.1
    every: int = 2
    calibration: str = AUTOMATIC
    inherit: str = OFF

    @property
    def on(self) -> bool:
        """Whether anything is to be done."""
        return self.ltc or self.inherits

    @property
    def inherits(self) -> bool:
        return self.inherit.strip() not in ("", OFF)

    def ltc_settings(self) -> LtcSettings:
        """How LTC-Accel chooses the steps. Raises LtcError for numbers that cannot be."""
        if self.calibration not in CALIBRATIONS:
            raise LtcError(f"LTC-Accel's calibration is one of {CALIBRATIONS}, not {self.calibration!r}.")
        return LtcSettings(tau=float(self.tau), every=int(self.every))

    def plan(self) -> Plan:
        """What feature inheritance leaves out. Raises InheritanceError for words that are no plan."""
        return parse_plan(self.inherit)


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
