"""One sampling run with LTC-Accel: it is told the latents of each step and says what a skipped step leads to.

Latents are those of the sigma parametrisation, x0 + sigma * noise (for flow matching, as they are). There a step of
Euler or DDIM goes along the predicted noise, so that a skip means: use the last prediction again, times a factor.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .counts import Counts
from .interval import LtcSettings, skipped_steps
from .table import LtcKey, LtcTable
from .transitions import Fit, angles

log = logging.getLogger(__name__)

SPOILT = "a picture of it holds NaN or infinity"
"""Why a run that measured itself leaves no table."""


class Measurements:
    """Angles and fits of every step, over any number of runs of the same schedule."""

    def __init__(self, steps: int, settings: LtcSettings) -> None:
        self.steps, self.settings = steps, settings
        self.fits = {i: Fit(settings.terms) for i in range(settings.terms, steps)}
        self.pictures = 0
        self._angles = [0.0] * steps

    def add(self, i: int, current: Tensor, directions: list[Tensor]) -> None:
        """Count the transition of step i [B, ...] and those before it, the latest first."""
        if i == 1:
            self.pictures += len(current)
        if directions:
            self._angles[i] += float(angles(current, directions[0]).sum())
        if i in self.fits and len(directions) >= self.settings.terms:
            self.fits[i].add(current, directions)

    @property
    def turns(self) -> tuple[float, ...]:
        """Mean theta_i of the steps i = 1, ..., N - 1."""
        return tuple(total / max(self.pictures, 1) for total in self._angles[1:])

    @property
    def finite(self) -> bool:
        """Whether no transition held NaN or infinity, of which no table can be made."""
        return all(map(math.isfinite, self._angles)) and all(fit.finite for fit in self.fits.values())

    def skipped(self) -> tuple[int, ...]:
        """The steps to skip by these angles."""
        return skipped_steps(self.turns, self.settings)

    def table(self, key: LtcKey) -> LtcTable:
        """Coefficients of the steps to skip, fitted on trajectories without skips; for measurements that are
        :attr:`finite`."""
        found = {i: self.fits[i].coefficients() for i in self.skipped()}
        return LtcTable(key, self.settings, found, self.turns, pictures=self.pictures)


class LtcRun:
    """The state of one run of ``steps`` steps. Exactly one of these holds:

    ``table``: steps in it are skipped. ``measure``: nothing is skipped and every transition is counted.
    ``fits``: nothing is skipped, but the steps named here are replaced by what a skip would give, fitted on the way,
    so that each coefficient is fitted on the errors of those before it (error-aware calibration).
    """

    def __init__(
        self,
        steps: int,
        *,
        table: LtcTable | None = None,
        measure: Measurements | None = None,
        fits: dict[int, Fit] | None = None,
        terms: int = 1,
    ) -> None:
        self.steps, self.table, self.measure, self.fits = steps, table, measure, fits or {}
        self.terms = table.settings.terms if table else measure.settings.terms if measure else terms
        self.skips_made = 0
        self.stopped = False
        """Whether nothing more is skipped."""
        self.complete = False
        """Whether the last step began."""
        self.real: set[int] = set()
        """Steps that are never skipped, as those in which another model takes over."""
        self.why = ""
        """What keeps some of them, or all, from being skipped, where the user should know."""
        self._latents: Tensor | None = None
        self._directions: list[Tensor] = []

    @property
    def counts(self) -> Counts:
        """What became of the run, in steps."""
        measures = "it measured itself at full cost" if self.measure is not None else ""
        lost = f", and keeps nothing: {SPOILT}" if self.spoilt else ""
        why = "; ".join(filter(None, (self.why, measures + lost)))
        return Counts(self.steps - self.skips_made, self.steps, why=why)

    @property
    def spoilt(self) -> bool:
        """Whether what it measured holds NaN or infinity, so that it leaves no table."""
        return self.measure is not None and not self.measure.finite

    def skips(self, i: int) -> bool:
        """Whether step i is skipped. False where the transitions before it were not seen (an interrupted run)."""
        return self.table is not None and not self.stopped and i in self.table.coefficients and i not in self.real

    def stop(self, why: str) -> None:
        """Skip nothing more, and say why, once."""
        self.stopped = True
        if not self.why:
            self.why = why
            log.warning("LTC-Accel makes every step from here on: %s.", why)

    def enter(self, i: int, x: Tensor) -> None:
        """Note the latents [B, ...] at the beginning of step i."""
        self._transition(i - 1, x)
        self._latents = x.detach().float()
        self.complete = i == self.steps - 1

    def target(self, i: int) -> Tensor:
        """x_{i+1} [B, ...] of a skipped step: x_i + sum of c D."""
        assert self.table is not None
        self.skips_made += 1
        return self._extrapolate(c * self.table.bias for c in self.table.coefficients[i])

    def fitted(self, i: int, full: Tensor) -> Tensor:
        """x_{i+1} of a step that is calibrated: ``full`` [B, ...] is where the model leads from here."""
        assert self._latents is not None
        self.fits[i].add(full.float() - self._latents, self._directions)
        return self._extrapolate(self.fits[i].coefficients())

    def finish(self, x: Tensor) -> None:
        """Note the latents [B, ...] after the last step and let go of everything."""
        self._transition(self.steps - 1, x)
        self._latents, self._directions = None, []

    def _extrapolate(self, factors: Iterable[float]) -> Tensor:
        assert self._latents is not None
        x = self._latents
        for factor, direction in zip(factors, self._directions, strict=False):
            x = torch.add(x, direction, alpha=factor)
        return x

    def _transition(self, i: int, x: Tensor) -> None:
        if self._latents is None:
            return
        current = x.detach().float() - self._latents
        if self.measure is not None and self._directions:
            self.measure.add(i, current, self._directions)
        self._directions = [current, *self._directions][: self.terms]
