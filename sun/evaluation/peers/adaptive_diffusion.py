"""AdaptiveDiffusion (Ye et al. 2024, arXiv 2410.09873): use the last noise again where latents change evenly.

With d_i = mean |x_i - x_{i-1}|, a step is skipped if |(d_i + d_{i-2}) / 2 - d_{i-1}| <= threshold * d_{i-1}, at most
``most`` in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .step_skipping import Moment

THRESHOLD = 0.01
MOST = 4


def changes_evenly(differences: Sequence[float], threshold: float) -> bool:
    """The criterion on the last three differences, the latest last."""
    before, middle, latest = differences[-3:]
    return abs((latest + before) / 2 - middle) <= threshold * middle


@dataclass
class AdaptiveDiffusion:
    """One picture."""

    threshold: float = THRESHOLD
    most: int = MOST
    differences: list[float] = field(default_factory=list)
    last: Tensor | None = None
    noise: Tensor | None = None
    in_a_row: int = 0

    def forecast(self, at: Moment) -> Tensor | None:
        # the first latents are noise alone and are not compared with
        if self.last is not None and at.step > 1:
            self.differences = [*self.differences, float((at.latents - self.last).abs().mean())][-3:]
        self.last = at.latents
        enough = len(self.differences) == 3 and self.in_a_row < self.most
        if not enough or not changes_evenly(self.differences, self.threshold):
            return None
        self.in_a_row += 1
        return self.noise

    def learn(self, at: Moment, guided: Tensor, rows: Tensor) -> None:
        self.noise, self.in_a_row = guided, 0
