"""Which steps LTC-Accel skips: the interval in which transitions hardly turn, and every r-th step of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import LtcError


@dataclass(frozen=True)
class LtcSettings:
    """How steps are chosen.

    tau: a step belongs to the interval while its transition turns by less than this, in radians; 0 takes every step
    that ``first`` and ``last`` allow. every: r; one step of r is skipped. first: the share of the steps, at the start,
    that is never skipped. last: how many steps at the end never are (the angles grow there). terms: transitions a skip
    is made of, 1 as published or 2.
    """

    tau: float = 0.1
    every: int = 2
    first: float = 0.25
    last: int = 2
    terms: int = 1

    def __post_init__(self) -> None:
        if (
            not 0 <= self.tau < math.inf
            or self.every < 2
            or not 0 <= self.first <= 1
            or self.last < 0
            or self.terms not in (1, 2)
            or any(number % 1 != 0 for number in (self.every, self.last))
        ):
            raise LtcError(
                "LTC-Accel takes tau of 0 or more (radians), a whole number every of 2 or more, first between 0 and 1, "
                f"a whole number last of 0 or more and 1 or 2 terms, not {self}."
            )


def interval(turns: Sequence[float], settings: LtcSettings) -> tuple[int, int] | None:
    """[a, b]: the longest run of allowed steps that turn by less than tau; None if there is none.

    turns: theta_i of the steps i = 1, ..., N - 1, in radians.
    """
    steps = len(turns) + 1
    best: tuple[int, int] | None = None
    begin: int | None = None
    for i in range(1, steps + 1):
        calm = i < steps and i in allowed(steps, settings) and (not settings.tau or turns[i - 1] < settings.tau)
        if calm and begin is None:
            begin = i
        elif not calm and begin is not None:
            if best is None or i - begin > best[1] - best[0] + 1:
                best = (begin, i - 1)
            begin = None
    return best


def skipped_steps(turns: Sequence[float], settings: LtcSettings) -> tuple[int, ...]:
    """The steps to skip: those i of the interval with i mod r = r - 1."""
    found = interval(turns, settings)
    if found is None:
        return ()
    return tuple(i for i in range(found[0], found[1] + 1) if i % settings.every == settings.every - 1)


def allowed(steps: int, settings: LtcSettings) -> range:
    """Steps that may be skipped: past the first share, before the last ones, with enough transitions behind them."""
    return range(max(int(steps * settings.first) + 1, settings.terms), steps - settings.last)
