"""Edges of a picture, white on black: what the edge ControlNet of Emoji Diffusion is trained on and wants to be given.

Canny's detector (IEEE PAMI 8(6), 1986) in plain torch, on colours: where two colours of equal brightness meet there is
an edge too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Offsets (dy, dx) of the neighbour a gradient points at, for angles of about 0, 45, 90 and 135 degrees.
_DIRECTIONS = ((0, 1), (1, 1), (1, 0), (1, -1))


@torch.no_grad()
def find_edges(pixels: Tensor, low: float = 0.05, high: float = 0.12, sigma: float = 1.0) -> Tensor:
    """Edges [B, 1, H, W], 1 on an edge and 0 elsewhere, of pictures [B, C, H, W] in 0..1.

    An edge starts where a colour channel changes by about 1.6 x ``high`` from one side to the other, and is followed
    as long as it changes by 1.6 x ``low``. ``sigma``, in pixels, is how much the picture is smoothed before.
    """
    if pixels.ndim != 4:
        raise ValueError(f"find_edges takes pictures [B, C, H, W], not a tensor of shape {list(pixels.shape)}.")
    across, down = _gradient(_smooth(pixels.float(), sigma))
    strength = (across.square() + down.square()).sqrt()
    strongest = strength.argmax(1, keepdim=True)
    strength, across, down = (t.gather(1, strongest) for t in (strength, across, down))
    thin = strength * _is_ridge(strength, across, down)
    return _follow(thin >= high, thin >= low).to(pixels.dtype)


def edge_picture(image: Any) -> Any:
    """:func:`find_edges` of a PIL picture, as an RGB picture: the ``--control`` of ``sun generate``."""
    import numpy as np
    from PIL import Image

    values = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255
    return Image.fromarray((find_edges(values)[0, 0] * 255).byte().numpy()).convert("RGB")


def edge_agreement(pixels: Tensor, edges: Tensor, tolerance: int = 2) -> Tensor:
    """How well the edges of ``pixels`` [B, C, H, W] in 0..1 agree with ``edges`` [B, 1, H, W]: F1 [B], 0 to 1.

    An edge counts as found within ``tolerance`` pixels. Two pictures without any edge agree.
    """
    found, wanted = find_edges(pixels).bool(), edges > 0.5

    def share(points: Tensor, near: Tensor) -> Tensor:
        reach = F.max_pool2d(near.float(), 2 * tolerance + 1, stride=1, padding=tolerance).bool()
        return (points & reach).sum((1, 2, 3)) / points.sum((1, 2, 3)).clamp(min=1)

    precision, recall = share(found, wanted), share(wanted, found)
    score = 2 * precision * recall / (precision + recall).clamp(min=1e-6)
    return torch.where(found.any(3).any(2).any(1) | wanted.any(3).any(2).any(1), score, torch.ones_like(score))


def _smooth(pixels: Tensor, sigma: float) -> Tensor:
    """A Gaussian of ``sigma`` pixels, cut at two sigma; the picture's border is continued."""
    reach = max(1, round(2 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=pixels.device) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(pixels.shape[1], 1, 1, -1)
    padded = F.pad(pixels, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=pixels.shape[1]), kernel.transpose(2, 3), groups=pixels.shape[1])


def _gradient(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel's differences to the right and downwards, of each channel, in its units over two pixels."""
    channels = pixels.shape[1]
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=pixels.device) / 4
    padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    kernels = (sobel.expand(channels, 1, 3, 3), sobel.T.expand(channels, 1, 3, 3))
    return F.conv2d(padded, kernels[0], groups=channels), F.conv2d(padded, kernels[1], groups=channels)


def _is_ridge(strength: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Where no neighbour along the gradient is stronger; of two equal ones, the first counts."""
    height, width = strength.shape[-2:]
    padded = F.pad(strength, (1, 1, 1, 1))
    octant = (torch.atan2(down, across) / (torch.pi / 4)).round().long() % 4
    ridge = torch.zeros_like(strength, dtype=torch.bool)
    for number, (dy, dx) in enumerate(_DIRECTIONS):
        ahead = padded[..., 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        behind = padded[..., 1 - dy : 1 - dy + height, 1 - dx : 1 - dx + width]
        ridge |= (octant == number) & (strength >= ahead) & (strength > behind)
    return ridge


def _follow(strong: Tensor, weak: Tensor) -> Tensor:
    """``weak`` points that hang together with ``strong`` ones."""
    while True:
        grown = F.max_pool2d(strong.float(), 3, stride=1, padding=1).bool() & weak
        if torch.equal(grown, strong):
            return strong
        strong = grown
