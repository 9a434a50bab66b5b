"""What lives as long as one sampling run: settings, the negatives, kept K and V, counts, and the line said of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..sun.conditioning import RunTexts
from ..sun.layers import AttentionLayer

WHOLE_RUN = (0.0, 1.0)


@dataclass(frozen=True)
class SunSettings:
    """What Apply SUN to Model remembers. `negative` is a CONDITIONING, or None: then the sampler's counts.

    effect: between which shares (0 to 1) of the way from noise to picture SUN acts. guidance: w of an adapter that
    takes it, or None: the adapter's own.
    """

    name: str
    strength: float
    negative: list | None
    layers: tuple[AttentionLayer, ...]
    effect: tuple[float, float] = WHOLE_RUN
    guidance: float | None = None


class Interval(NamedTuple):
    """Sigmas between which something is in force; the default is always."""

    start: float = float("inf")
    end: float = 0.0

    def __contains__(self, sigma: object) -> bool:
        return isinstance(sigma, float) and self.end <= sigma <= self.start

    @classmethod
    def of_percents(cls, sampling: Any, start: float = 0.0, end: float = 1.0) -> Interval:
        """From shares of the way from noise (0) to picture (1), as ComfyUI's nodes count them."""
        return cls(
            float("inf") if start <= 0.0 else float(sampling.percent_to_sigma(start)),
            0.0 if end >= 1.0 else float(sampling.percent_to_sigma(end)),
        )


ALWAYS = Interval()


class NegativeEntry(NamedTuple):
    """One entry of the negative conditioning: its weight and when it is in force."""

    weight: float
    when: Interval


@dataclass(eq=False)
class SunRun:
    """One sampling run. The tensors of `entries` travel in the conditioning; `texts` is emptied when the run ends."""

    settings: SunSettings
    entries: tuple[NegativeEntry, ...] = ()
    effect: Interval = ALWAYS
    texts: RunTexts = field(default_factory=RunTexts)
    calls: int = 0
    """U-Net calls so far."""

    def __deepcopy__(self, _memo: object) -> SunRun:
        """Itself: nodes that copy model_options in the middle of a run stay in that run."""
        return self

    def weights(self, sigma: torch.Tensor) -> dict[int, float]:
        """Weights, adding up to 1, of the negative entries in force at this sigma [B]; none when SUN is not."""
        intervals = [self.effect, *(entry.when for entry in self.entries)]
        # Reading sigma waits for the device: only where it matters.
        now = float(sigma.flatten()[0]) if any(interval != ALWAYS for interval in intervals) else 1.0
        if self.settings.strength == 0.0 or now not in self.effect:
            return {}
        weights = {i: entry.weight for i, entry in enumerate(self.entries) if now in entry.when}
        total = sum(weights.values())
        return {i: weight / total for i, weight in weights.items()} if total > 0 else {}


class RunReport(NamedTuple):
    """What happened in a run. `negative_tokens`: of each negative entry."""

    calls: int
    seconds: float
    layers: int
    negative_tokens: tuple[int, ...]

    def __str__(self) -> str:
        calls = f"{self.calls} U-Net call{'' if self.calls == 1 else 's'}"
        tokens = " + ".join(map(str, self.negative_tokens)) or "0"
        return f"{calls}, {self.seconds:.1f} s, {self.layers} layers, negative {tokens} tokens"
