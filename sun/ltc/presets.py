"""Which steps are skipped by position, and the presets with what each of them gives."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from .errors import LtcError
from .forecast import KINDS, MOST_TERMS

PAPER = "paper"
"""The published method: transitions of latents, steps chosen by how they turn, coefficients measured at full cost."""
AUTOMATIC_KIND = "automatic"


@dataclass(frozen=True)
class SkipSettings:
    """Which steps are skipped and how they are forecast.

    first: the share of the steps, at the start, that always run (warm-up). last: how many at the end always do (tail).
    every, row: of each ``every`` steps between them the model is called in all but ``row``; 2 and 1 are every second.
    terms: outputs a forecast is made of, see :class:`.Forecast`. kind: what is forecast, noise or x0; automatic takes
    x0 where the sampler adds fresh noise. guard: a step runs although it might be skipped when the last call was this
    many times as far from its forecast as the calls before it were; 0 switches this off. ridge, memory: of the fit in
    the run.
    """

    first: float = 0.25
    last: int = 2
    every: int = 2
    row: int = 1
    terms: int = 3
    kind: str = AUTOMATIC_KIND
    guard: float = 2.0
    ridge: float = 1.0
    memory: float = 0.5

    def __post_init__(self) -> None:
        numbers = (self.first, self.guard, self.ridge, self.memory)
        whole = (self.last, self.every, self.row, self.terms)
        if any(not isinstance(n, (int, float)) or not math.isfinite(n) or n < 0 for n in numbers + whole):
            raise LtcError(f"LTC-Accel takes finite numbers of 0 or more, not {self}.")
        if any(n != int(n) for n in whole):
            raise LtcError(f"LTC-Accel takes whole numbers for last, every, row and terms, not {self}.")
        if self.first > 1 or self.every < 2 or not 1 <= self.row < self.every or not 1 <= self.terms <= MOST_TERMS:
            raise LtcError(
                "LTC-Accel takes first between 0 and 1, every of 2 or more, row of 1 to every - 1 and terms of 1 to "
                f"{MOST_TERMS}, not {self}."
            )
        if self.kind not in (AUTOMATIC_KIND, *KINDS):
            raise LtcError(f"LTC-Accel forecasts {', '.join(KINDS)} or {AUTOMATIC_KIND}, not {self.kind!r}.")

    def skipped(self, steps: int) -> tuple[int, ...]:
        """The steps of 0, ..., ``steps`` - 1 that are skipped.

        Counted from the end, where outputs change least: with every = 2 the last step that may be skipped is, and then
        every second one before it.
        """
        begin = max(math.ceil(self.first * steps - 1e-9), min(self.terms, 2))
        end = steps - self.last
        return tuple(i for i in range(begin, end) if (end - 1 - i) % self.every < self.row)

    def calls(self, steps: int) -> int:
        """Steps that call the model where the guard asks for no more."""
        return steps - len(self.skipped(steps))


PRESETS = {
    "fine": SkipSettings(first=0.4, last=3, guard=1.5),
    "balanced": SkipSettings(),
    "fast": SkipSettings(first=0.15, guard=3.0),
    "fastest": SkipSettings(every=3, row=2, guard=3.0),
}
BALANCED = "balanced"
NAMES = (*PRESETS, PAPER)
SHOWN_STEPS = (15, 20, 25, 30, 50)


def preset(name: str, **overrides: Any) -> SkipSettings:
    """The settings of a preset, with some of them changed. Raises LtcError for names and settings there are not."""
    if name not in PRESETS:
        raise LtcError(f"LTC-Accel has the presets {', '.join(NAMES)}, not {name!r}.")
    known = [field.name for field in fields(SkipSettings)]
    if unknown := [key for key in overrides if key not in known]:
        raise LtcError(f"LTC-Accel's preset {name} has no setting {unknown[0]!r}; it has {', '.join(known)}.")
    return replace(PRESETS[name], **overrides)


def gives(name: str) -> str:
    """What a preset gives where no picture turns: ``13 of 20`` calls, for some numbers of steps."""
    return ", ".join(f"{PRESETS[name].calls(steps)} of {steps}" for steps in SHOWN_STEPS)


def tooltip() -> str:
    """What all presets give, in a few lines."""
    lines = [f"{name} calls the model in {gives(name)} steps." for name in PRESETS]
    more = "Where a picture turns, a step that was to be skipped runs after all."
    return " ".join([*lines, more, "paper: the published method, whose first run measures itself at full cost."])
