"""Fine-tunes that nobody trained: a base's weights moved at random, or along what real fine-tunes of it learned.

An adapter has to carry over to models it never saw. Real fine-tunes to train it on cost hours each; these cost the sum
of two matrices. None is kept: its weights are computed when its turn comes, from a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import SunTrainConfig

Weights = Mapping[str, Tensor]

REACH = (-0.5, 1.5)  # of the way from the base to a real fine-tune; beyond either end too


@dataclass(frozen=True)
class VirtualFineTune:
    """One model between or beside those there are.

    seed: decides all of it. rank and strength: each matrix moves by a random one of this rank whose Frobenius norm is
    ``strength`` times its own; vectors (biases, norms) stay. With ``real`` fine-tunes it also moves along them: by a
    random share from REACH of the way to one of them, and of a second one by what is left to 1.
    """

    seed: int
    rank: int
    strength: float
    real: Sequence[Weights] = field(default=(), repr=False)

    def weights(self, base: Weights) -> dict[str, Tensor]:
        """Those of this model, by the names of ``base``; new tensors, on its device and in its dtype."""
        draw = torch.Generator().manual_seed(self.seed)
        shares = self._shares(draw)
        return {name: self._moved(name, weight, shares, draw) for name, weight in base.items()}

    def _shares(self, draw: torch.Generator) -> list[tuple[float, Weights]]:
        if not self.real:
            return []
        order = torch.randperm(len(self.real), generator=draw).tolist()
        share = REACH[0] + (REACH[1] - REACH[0]) * torch.rand((), generator=draw).item()
        return list(zip((share, 1 - share), (self.real[i] for i in order[:2]), strict=False))

    def _moved(
        self, name: str, weight: Tensor, shares: Sequence[tuple[float, Weights]], draw: torch.Generator
    ) -> Tensor:
        moved = weight.clone()
        for share, other in shares:
            moved += share * (other[name] - weight)
        if weight.ndim > 1 and self.strength:
            rows, columns = weight.flatten(1).shape
            rank = min(self.rank, rows, columns)  # more would cost memory and change nothing
            left = torch.randn(rows, rank, generator=draw)
            right = torch.randn(rank, columns, generator=draw)
            delta = (left @ right).view_as(weight).to(weight)
            moved += delta * (self.strength * weight.norm() / delta.norm().clamp(min=1e-12))
        return moved


def virtual_fine_tunes(config: SunTrainConfig, real: Sequence[Weights]) -> list[VirtualFineTune]:
    """Those that the configuration asks for, by its run's seed."""
    first = 1_000_003 * (config.run.seed + 1)
    return [
        VirtualFineTune(first + i, config.virtual_rank, config.virtual_strength, real)
        for i in range(config.virtual_fine_tunes)
    ]
