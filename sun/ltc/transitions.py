"""The two measures of LTC-Accel (arXiv 2503.09675): the angle between transitions, and the coefficient of a skip.

The transition of step i is D_i = x_{i+1} - x_i. A skipped step goes x_{i+1} = x_i + c_i D_{i-1}.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor


def angles(current: Tensor, previous: Tensor) -> Tensor:
    """theta = angle(D_i, D_{i-1}) in radians, one a picture: [B] of transitions [B, ...]."""
    a, b = (rearrange(t.detach().cpu().double(), "b ... -> b (...)") for t in (current, previous))
    # The half-angle form keeps small angles exact, where the arc cosine of a rounded product would not.
    a, b = (t / t.norm(dim=1, keepdim=True).clamp_min(1e-300) for t in (a, b))
    return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))


@dataclass
class Fit:
    """Least squares of a transition on the ones before it, over any number of pictures.

    With one term this is the closed form c_i = <D_i, D_{i-1}> / ||D_{i-1}||^2. Two terms, D_{i-1} and D_{i-2}, are an
    extension of ours. Only sums of products are kept, so pictures may come one batch after the other.
    """

    terms: int = 1
    products: list[list[float]] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.products = self.products or [[0.0] * self.terms for _ in range(self.terms)]
        self.moments = self.moments or [0.0] * self.terms

    def add(self, current: Tensor, directions: Sequence[Tensor]) -> None:
        """Count D_i = ``current`` [B, ...] and the transitions before it, the latest first."""
        target = rearrange(current.detach().cpu().double(), "... -> (...)")
        rows = torch.stack([rearrange(d.detach().cpu().double(), "... -> (...)") for d in directions[: self.terms]])
        products, moments = (rows @ rows.T).tolist(), (rows @ target).tolist()
        for i in range(self.terms):
            self.moments[i] += moments[i]
            for j in range(self.terms):
                self.products[i][j] += products[i][j]

    @property
    def finite(self) -> bool:
        """Whether nothing that was counted held NaN or infinity."""
        return all(math.isfinite(number) for row in (*self.products, self.moments) for number in row)

    def coefficients(self) -> tuple[float, ...]:
        """c for each term; 0 where there is no direction at all, NaN where what was counted is not :attr:`finite`."""
        if not self.finite:
            return (math.nan,) * self.terms
        matrix, moments = torch.tensor(self.products).double(), torch.tensor(self.moments).double()
        scale = float(matrix.diagonal().max())
        if scale <= 0:
            return (0.0,) * self.terms
        return tuple((torch.linalg.pinv(matrix / scale, rcond=1e-9) @ (moments / scale)).tolist())
