"""What Apply SUN to Model remembers, and what is said of one sampling run; the run itself is `sun.kept.SunRun`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..sun.kept import Interval
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


def interval(sampling: Any, start: float = 0.0, end: float = 1.0) -> Interval:
    """Sigmas between two shares of the way from noise (0) to picture (1), as ComfyUI's nodes count them."""
    return Interval(
        float("inf") if start <= 0.0 else float(sampling.percent_to_sigma(start)),
        0.0 if end >= 1.0 else float(sampling.percent_to_sigma(end)),
    )


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
