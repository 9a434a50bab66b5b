"""Flat colours for autoencoders to learn from, moved as guidance moves latents: scaled, and extrapolated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.settings import ConfigError
from .colours import object_colours
from .scenes import BACKGROUNDS


def named_colours(style: str) -> Tensor:
    """[N, 3] in -1..1: of the backgrounds and of everyday objects, where those of the style are known."""
    try:
        objects = object_colours(style, "everyday")
    except ConfigError:  # a style whose colours nobody listed
        objects = {}
    return torch.tensor([*BACKGROUNDS.values(), *objects.values()]) / 127.5 - 1


def colours_of_all_kinds(count: int, seed: int) -> Tensor:
    """[count, 3] in -1..1: two of three anywhere, the third near the pure ones, black and white."""
    generator = torch.Generator().manual_seed(seed)
    pure = count // 3
    anywhere = torch.rand(count - pure, 3, generator=generator) * 2 - 1
    corners = (torch.rand(pure, 3, generator=generator) > 0.5) * 2.0 - 1
    return torch.cat([anywhere, (corners + 0.15 * torch.randn(pure, 3, generator=generator)).clamp(-1, 1)])


@dataclass(frozen=True)
class Extrapolation:
    """How flat colours are moved, their latents and the colours themselves alike: the first ones are scaled by
    ``scale`` [A], the others lie on the line to a neighbour at ``share`` [B], 1 being their own place."""

    scale: Tensor
    share: Tensor

    @classmethod
    def draw(cls, count: int, device: torch.device) -> Extrapolation:
        """Of ``count`` colours half are scaled by 0.35 to 2.2, a quarter of those by 1; half move, up to 0.6 beyond
        either colour."""
        scale = torch.exp(torch.empty(count // 2, device=device).uniform_(-1.05, 0.79))
        scale[: count // 8] = 1.0
        return cls(scale, torch.empty(count - count // 2, device=device).uniform_(-0.6, 1.6))

    def of(self, values: Tensor) -> Tensor:
        """Values [A + B, ...], moved."""
        scale, share = (part.view(-1, *[1] * (values.ndim - 1)) for part in (self.scale, self.share))
        first, second = values[: len(scale)], values[len(scale) :]
        return torch.cat([scale * first, share * second + (1 - share) * second.roll(1, 0)])
