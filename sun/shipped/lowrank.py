"""A model as another one's weights plus changes of low rank (Hu et al. 2021, arXiv 2106.09685), in a small file.

A file of changes holds, for a layer ``x`` of the base, ``x.up`` [out, r] and ``x.down`` [r, in x kernel], to be added
to ``x.weight`` as their product; what it holds under a weight's own name takes that weight's place.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """A weight plus ``up @ down``, which starts at nothing. To be put on a layer by :func:`add_low_rank`.

    The product is added to the weight and not computed beside it: one small multiplication a layer, whatever the
    batch, where adapter layers would cost two more convolutions.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        rank = min(rank, rows, columns)
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.down = nn.Parameter(torch.randn(rank, columns) / columns**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def add_low_rank(module: nn.Module, rank: int, leave: tuple[str, ...] = ()) -> None:
    """Freeze ``module`` and give its linear and convolution layers a trainable :class:`LowRank` change.

    Layers whose names begin with one of ``leave`` stay as they are and are trained whole.
    """
    layers = [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not name.startswith(leave or ("\0",))
    ]
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(leave or ("\0",)))
    for _, layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))


def changes_of(module: nn.Module) -> dict[str, Tensor]:
    """What was trained on ``module`` since :func:`add_low_rank`, as a file holds it: fp16, on the CPU."""
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            # "x.parametrizations.weight.0.up" is the change of layer x
            layer, _, part = name.partition(".parametrizations.weight.0.")
            found[f"{layer}.{part}" if part else name] = parameter.detach().half().cpu().contiguous()
    return found


def merge(weights: Mapping[str, Tensor], changes: Mapping[str, Tensor], what: str = "the changes") -> dict[str, Tensor]:
    """``weights`` with ``changes`` (see above), in the dtype of each weight.

    Raises ValueError, naming ``what``, if the changes are not of a model with these weights.
    """
    merged = dict(weights)
    for name, change in changes.items():
        layer, _, part = name.rpartition(".")
        if part == "down":
            continue
        target = f"{layer}.weight" if part == "up" else name
        if target not in merged or (part == "up" and f"{layer}.down" not in changes):
            raise ValueError(f"{what} changes {name}, which this base model does not have: it is for another base.")
        weight = merged[target]
        if part != "up":
            merged[target] = change.to(weight.dtype)  # of any shape: an inpainting model's first layer is wider
            continue
        down = changes[f"{layer}.down"]
        # Looked at before they are multiplied: two short columns of a small file can make gigabytes.
        fit = change.ndim == down.ndim == 2 and change.shape[1] == down.shape[0] and weight.ndim >= 2
        if not fit or (len(change), down.shape[1]) != tuple(weight.flatten(1).shape):
            raise _other_size(what, layer, weight, f"{list(change.shape)} by {list(down.shape)}")
        product = change.float() @ down.float()
        merged[target] = (weight.float() + product.to(weight.device).view_as(weight)).to(weight.dtype)
    return merged


def _other_size(what: str, name: str, weight: Tensor, theirs: object) -> ValueError:
    return ValueError(
        f"{what} is for a base model of another size: {name} is {list(weight.shape)} here and {theirs} there."
    )
