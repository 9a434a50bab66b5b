"""What the layers of an adapter need of a run's texts, and the two rules by which rows are repeated."""

from __future__ import annotations

from typing import NamedTuple

from einops import repeat
from torch import Tensor


class Branch(NamedTuple):
    """One text beside the frozen one, at one layer."""

    key: Tensor
    """[B, L, C]"""
    value: Tensor
    """[B, L, C]"""
    scale: Tensor
    """What its attention is multiplied with besides the norms' ratio: alpha with sign, strength and weight; [C], or
    [B, 1, C] where images differ; float32 or better."""
    mask: Tensor | None = None
    """Attention mask over the text, added to the scores; broadcasts to [B, heads, T, L]."""


class LayerTexts(NamedTuple):
    """All texts at one layer; none at strength 0, where the layer changes nothing."""

    branches: tuple[Branch, ...] = ()
    shift: Tensor | None = None
    """What the branches' beta add up to: [C] or [B, 1, C]."""
    normalized: bool = True
    """With Attention Normalization (Eq. 5)."""


class AdapterTexts(NamedTuple):
    """All texts at all layers, in the adapter's order."""

    layers: tuple[LayerTexts, ...]


def repeated_in_turn(text: Tensor, rows: int) -> Tensor:
    """Text states [B, L, D] as [rows, L, D], in the order 0, 1, ..., 0, 1, ...: a host's batch that holds every image
    several times, one whole batch after the other.

    Raises ValueError if ``rows`` is no multiple of B.
    """
    if text.shape[0] == rows:
        return text
    if text.shape[0] and rows % text.shape[0] == 0:
        return repeat(text, "b l d -> (n b) l d", n=rows // text.shape[0])
    raise ValueError(
        f"SUN: something changed the batch to {rows} rows, and the negative prompt has {text.shape[0]}, which does not "
        "divide it. Use a batch size of 1 with it."
    )


def repeated_side_by_side(values: Tensor, rows: int, name: str) -> Tensor:
    """``values`` [B, ...] as [rows, ...], in the order 0, 0, ..., 1, 1, ...: diffusers keeps the images of a prompt
    together.

    Raises ValueError, naming ``name``, if ``rows`` is no multiple of B.
    """
    given = values.shape[0]
    if given == 0 or rows % given:
        raise ValueError(
            f"{name} has {given} rows for a batch of {rows}. Pass 1, {rows}, or a number that divides {rows}."
        )
    return values if given == rows else repeat(values, "b ... -> (b n) ...", n=rows // given)
