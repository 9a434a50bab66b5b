"""The rule: which of two U-Nets runs at which noise level.

After A-SDM's multi-UNet switching (arXiv 2406.00210; its text was not available, so this is a reconstruction) and
T-Stitch (arXiv 2402.14167): a small U-Net in the early steps, the original in the later ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

SMALL_FIRST, LARGE_FIRST = "small first", "large first"
ORDERS = (SMALL_FIRST, LARGE_FIRST)
_TINY = 1e-3
"""Of the way from one level to the next: what rounding may move a level."""


class SwitchingError(ValueError):
    """Two U-Nets that cannot take turns, or settings that cannot be; the text says what to do."""


@dataclass(frozen=True)
class Border:
    """Between the noise levels of the first U-Net and those of the second, for one run."""

    level: float
    small_above: bool

    def small(self, level: float) -> bool:
        """Whether the small U-Net runs at this level (sigma or timestep)."""
        return (level > self.level) == self.small_above


@dataclass(frozen=True)
class Switching:
    """The share of the steps that the small U-Net runs, from 0 to 1, and which U-Net begins.

    Raises SwitchingError for other values.
    """

    share: float = 0.4
    order: str = SMALL_FIRST

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 <= self.share <= 1:
            raise SwitchingError(f"The small U-Net's share of the steps is a number from 0 to 1, not {self.share!r}.")
        if self.order not in ORDERS:
            raise SwitchingError(f"The order is {' or '.join(map(repr, ORDERS))}, not {self.order!r}.")

    def __str__(self) -> str:
        return f"{self.share:g} {self.order}"

    def small_steps(self, steps: int) -> int:
        """How many of ``steps`` steps the small U-Net runs."""
        return math.floor(self.share * steps + 0.5)

    def switches_at(self, steps: int) -> int | None:
        """The first step of the second U-Net, from 0; None where one of them runs alone."""
        small = self.small_steps(steps)
        first = small if self.order == SMALL_FIRST else steps - small
        return first if 0 < first < steps else None

    def border(self, levels: Iterable[float]) -> Border:
        """For a run whose steps begin at ``levels`` (sigmas or timesteps, any order; the end of the run left out).

        A level asked for between two steps, as by solvers of second order, belongs to the step it is in.
        """
        falling = sorted(set(levels), reverse=True)
        small_first = self.order == SMALL_FIRST
        small = self.small_steps(len(falling))
        first = small if small_first else len(falling) - small
        if first == 0:
            return Border(math.inf, small_first)
        if first == len(falling):
            return Border(-math.inf, small_first)
        before, after = falling[first - 1], falling[first]
        return Border(after + _TINY * (before - after), small_first)
