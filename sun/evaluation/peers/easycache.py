"""EasyCache (Zhou et al. 2025, arXiv 2507.02860) and LazyCache as ComfyUI's core has them, from the formula.

A computed step tells how much the output changes as the input does, k = |dy| / |dx|. Later |dy| / |y| is guessed from
k |dx|, and steps are left out, y = x + (last y - last x), while the guesses add up to less than ``threshold``.
EasyCache looks at the network's own input and output and decides by one of the two passes of guidance; LazyCache looks
at the latents and the guided clean latents. Both begin at ``start`` and end at ``end``, shares of the noise schedule. A
grid of every eighth place is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .step_skipping import Moment

THRESHOLD, START, END = 0.2, 0.15, 0.95
GRID = 8


@dataclass
class CacheSettings:
    """threshold: of the guessed relative change. start, end: between which shares of the noise schedule steps are left
    out; ``percent`` of ComfyUI, which counts training timesteps down."""

    threshold: float = THRESHOLD
    start: float = START
    end: float = END

    def begun(self, at: Moment) -> bool:
        return at.time <= (1 - self.start) * (at.times - 1)

    def over(self, at: Moment) -> bool:
        return at.time <= (1 - self.end) * (at.times - 1)


def _grid(x: Tensor) -> Tensor:
    return x[..., ::GRID, ::GRID]


@dataclass
class ChangeRate:
    """What is known of how outputs follow inputs; the sum of guesses since the last computed step."""

    rate: float | None = None
    total: float = 0.0
    x: Tensor | None = None
    y: Tensor | None = None
    size: float = 0.0
    moved: float | None = None

    def may_skip(self, x: Tensor, threshold: float) -> bool:
        """Whether the input x has changed so little that the step may be left out."""
        self.moved = None if self.x is None else float((_grid(x) - self.x).abs().mean())
        if self.moved is None or self.rate is None:
            return False
        self.total += self.rate * self.moved / self.size
        if self.total < threshold:
            return True
        self.total = 0.0
        return False

    def computed(self, x: Tensor, y: Tensor, size: float) -> None:
        """The model was asked: input, output, and the mean size of all outputs."""
        if self.y is not None and self.moved:
            self.rate = float((_grid(y) - self.y).abs().mean()) / self.moved
        self.x, self.y, self.size, self.moved = _grid(x), _grid(y), size, None


@dataclass
class EasyCache:
    """One picture. ``decides``: the pass of guidance looked at, 0 the prompt's and 1 the negative's, as in ComfyUI,
    where that is the first of the batch."""

    settings: CacheSettings = field(default_factory=CacheSettings)
    decides: int = 1
    change: ChangeRate = field(default_factory=ChangeRate)
    residual: Tensor | None = None

    def forecast(self, at: Moment) -> Tensor | None:
        settings = self.settings
        if settings.over(at) or not settings.begun(at) or not self.change.may_skip(at.z, settings.threshold):
            return None
        return None if self.residual is None else at.z + self.residual

    def learn(self, at: Moment, guided: Tensor, rows: Tensor) -> None:
        if self.settings.over(at):
            return
        self.residual = guided - at.z
        if self.settings.begun(at):  # before that it has not chosen the pass it looks at
            self.change.computed(at.z, rows[self.decides], float(rows.abs().mean()))


@dataclass
class LazyCache:
    """One picture."""

    settings: CacheSettings = field(default_factory=CacheSettings)
    change: ChangeRate = field(default_factory=ChangeRate)
    residual: Tensor | None = None

    def forecast(self, at: Moment) -> Tensor | None:
        settings, x = self.settings, at.z / at.alpha
        if settings.over(at) or not settings.begun(at) or not self.change.may_skip(x, settings.threshold):
            return None
        return None if self.residual is None else at.noise(x + self.residual)

    def learn(self, at: Moment, guided: Tensor, rows: Tensor) -> None:
        if self.settings.over(at):
            return
        x, clean = at.z / at.alpha, at.clean(guided)
        self.residual = clean - x
        self.change.computed(x, clean, float(clean.abs().mean()))
