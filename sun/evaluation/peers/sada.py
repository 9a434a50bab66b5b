"""SADA (Jiang et al. 2025, arXiv 2507.17135): skip a step where the path of the solver is stable.

With y = dx/dt of the probability-flow ODE, a step is stable if (x_{t-1} - x^_{t-1}) . D2 y_t < 0, x^ being the
third-order extrapolation x_t - 5/6 dt y_t - 5/6 dt y_{t+1} + 2/3 dt y_{t+2}. The step after a stable one uses the last
noise at x^; ``lagrange`` instead skips three of four steps of the second half by interpolating x0. At most four steps
in a row are skipped. Pruning of tokens, the paper's third part, is left out: it acts inside of a call.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .step_skipping import Moment

MOST = 4  # steps skipped in a row
FIRST = 0.2  # share of the run that is computed first, three steps at least: 10 of the release's 50
LAST = 3  # the release's range ends at 47 of 50
EVERY = 4  # one of so many steps of the second half is computed with lagrange
TERMS = 4  # points of the interpolation
LAGRANGE_FROM = 0.48  # share of the run, 24 of the release's 50 steps


def extrapolated(x: Tensor, y: Tensor, y1: Tensor, y2: Tensor, dt: float) -> Tensor:
    """x^_{t-1} from x_t and y of this step and the two before it; dt > 0 is how far time goes back."""
    return x - dt * (5 / 6 * y + 5 / 6 * y1 - 2 / 3 * y2)


def is_stable(reached: Tensor, x: Tensor, y: Tensor, y1: Tensor, y2: Tensor, dt: float) -> bool:
    """The criterion for ``reached`` = x_{t-1}, averaged over all elements."""
    error = reached - extrapolated(x, y, y1, y2, dt)
    return bool((error * (y - 2 * y1 + y2)).mean() <= 0)


def lagrange(times: list[float], values: list[Tensor], wanted: float) -> Tensor:
    """The polynomial through ``values`` at ``times``, at ``wanted``."""
    found = torch.zeros_like(values[0])
    for i, value in enumerate(values):
        factor = 1.0
        for j, other in enumerate(times):
            if j != i:
                factor *= (wanted - other) / (times[i] - other)
        found = found + factor * value
    return found


@dataclass
class Sada:
    """One picture. ``half``: where the interpolation of x0 begins, as a share of the run; 1: nowhere."""

    half: float = 1.0
    slopes: list[Tensor] = field(default_factory=list)
    last: Moment | None = None
    noise: Tensor | None = None
    in_a_row: int = 0
    clean: dict[int, Tensor] = field(default_factory=dict)

    def forecast(self, at: Moment) -> Tensor | None:
        found = self._forecast(at)
        self.in_a_row = 0 if found is None else self.in_a_row + 1
        if found is not None:
            self._remember(at, self.noise if self.noise is not None else found)
        return found

    def _forecast(self, at: Moment) -> Tensor | None:
        decided = at.step - 1  # the step before says whether this one is skipped
        begin, half = max(3, round(FIRST * at.steps)), EVERY * round(self.half * at.steps / EVERY)
        if not begin <= decided < at.steps - LAST or self.in_a_row >= MOST or len(self.slopes) < 3:
            return None
        if self.half < 1 and decided >= half:
            points = sorted(self.clean)[-TERMS:]
            if decided % EVERY == 0 or len(points) < 2:
                return None
            return at.noise(lagrange([float(p) for p in points], [self.clean[p] for p in points], float(at.step)))
        last, (y2, y1, y) = self.last, self.slopes
        assert last is not None
        assert self.noise is not None
        dt = (last.time - last.later) / last.times
        if not is_stable(at.z, last.z, y, y1, y2, dt):
            return None
        return self.noise + (at.z - extrapolated(last.z, y, y1, y2, dt)) / at.sigma

    def learn(self, at: Moment, guided: Tensor, rows: Tensor) -> None:
        self.noise = guided
        if at.step % EVERY == 1:
            self.clean[at.step] = at.clean(guided)
        self._remember(at, guided)

    def _remember(self, at: Moment, noise: Tensor) -> None:
        # y of the probability-flow ODE with time from 0 to 1: beta(t) is its discrete value times the timesteps
        slope = 0.5 * at.beta * at.times * (noise / at.sigma - at.z)
        self.slopes, self.last = [*self.slopes, slope][-3:], at
