"""What an adapter makes of a run's texts: K, V and factors, which are the same at every step of the run."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from .adapter import SunAdapter


class Branch(NamedTuple):
    """One text beside the frozen one, at one layer."""

    key: torch.Tensor
    """[B, L, C]"""
    value: torch.Tensor
    """[B, L, C]"""
    scale: torch.Tensor
    """What its attention is multiplied with besides the norms' ratio: alpha with sign, strength and weight; [C], or
    [B, 1, C] where images differ; float32 or better."""
    mask: torch.Tensor | None = None
    """Attention mask over the text."""


class LayerTexts(NamedTuple):
    """All texts at one layer; ``shift`` [C] or [B, 1, C] is what their beta add up to."""

    branches: tuple[Branch, ...]
    shift: torch.Tensor


class AdapterTexts(NamedTuple):
    """All texts at all layers, in the adapter's order, and the embeddings [B, L, text_width] they were made of."""

    negatives: tuple[torch.Tensor, ...]
    positive: torch.Tensor | None
    layers: tuple[LayerTexts, ...]


@dataclass
class RunTexts:
    """Keeps an adapter's K and V for the steps of one run. The host owns it and clears it when the run ends.

    They are computed anew whenever anything they depend on is not exactly what it was: the texts (compared by value),
    their weights, the strength, dtype or device, the guidance, or the adapter's weights. An adapter in training, or
    with hooks on its projections, is never kept. What is kept is what would have been computed, bit for bit.
    """

    _kept: dict[Hashable, tuple[_MadeOf, AdapterTexts]] = field(default_factory=dict)

    def __call__(
        self,
        adapter: SunAdapter,
        negatives: Sequence[tuple[float, torch.Tensor]],
        positive: torch.Tensor | None = None,
        *,
        strength: float = 1.0,
        guidance: torch.Tensor | None = None,
        key: Hashable = None,
    ) -> AdapterTexts:
        """``adapter.texts(...)``, computed now or kept from an earlier step.

        key: names these texts among the several of a run (regions); one set is kept for each.
        """
        if adapter.training or _hooked(adapter):
            return adapter.texts(negatives, positive, strength=strength, guidance=guidance)
        weights, texts = tuple(weight for weight, _ in negatives), tuple(text for _, text in negatives)
        tensors = tuple((tensor, _version(tensor)) for tensor in (*texts, positive, guidance))
        made_of = _MadeOf(_state(adapter), strength, weights, tensors)
        kept = self._kept.get(key)
        if kept is not None and kept[0].same(made_of):
            return kept[1]
        made = adapter.texts(negatives, positive, strength=strength, guidance=guidance)
        self._kept[key] = (made_of, made)
        return made

    def clear(self) -> None:
        """Forget everything: the run has ended."""
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)


class _MadeOf(NamedTuple):
    weights: tuple[tuple[int, int], ...]
    strength: float
    shares: tuple[float, ...]
    tensors: tuple[tuple[torch.Tensor | None, int], ...]

    def same(self, other: _MadeOf) -> bool:
        settings = self.weights == other.weights and self.strength == other.strength and self.shares == other.shares
        return settings and all(map(_equal, self.tensors, other.tensors))


def _equal(mine: tuple[torch.Tensor | None, int], theirs: tuple[torch.Tensor | None, int]) -> bool:
    a, b = mine[0], theirs[0]
    if a is None or b is None or a is b:
        return a is b and mine[1] == theirs[1]  # one tensor may have been written to in between
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return torch.equal(a, b)


def _version(tensor: torch.Tensor | None) -> int:
    """How often torch saw the tensor written to; it does not count that of tensors made in inference mode."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _state(adapter: SunAdapter) -> tuple[tuple[int, int], ...]:
    """Changes when a weight is replaced or written to. Asked at every step: kept quick."""
    weights = (p for module in _modules(adapter) for p in module._parameters.values() if p is not None)
    return tuple((id(p), _version(p)) for p in weights)


def _hooked(adapter: SunAdapter) -> bool:
    """Whether someone watches or changes what the projections do."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in _modules(adapter, layers=False))


def _modules(adapter: SunAdapter, layers: bool = True) -> Iterator[nn.Module]:
    """The adapter's projections and, unless left out, its layers."""
    for layer in adapter.layers:
        if layers:
            yield layer
        yield from (projection for projection in layer._modules.values() if projection is not None)


def match_rows(text: torch.Tensor, rows: int) -> torch.Tensor:
    """Text states [B, L, D] with one row for each of ``rows``: a host's batch may hold every image several times.

    Rows repeat as a whole, image 0, 1, ..., 0, 1, ... Raises ValueError if ``rows`` is no multiple of B.
    """
    if text.shape[0] == rows:
        return text
    if text.shape[0] == 1:
        return text.expand(rows, -1, -1)
    if rows % text.shape[0] == 0:
        return text.repeat(rows // text.shape[0], 1, 1)
    raise ValueError(
        f"SUN: something changed the batch to {rows} rows, and the negative prompt has {text.shape[0]}, which does not "
        "divide it. Use a batch size of 1 with it."
    )
