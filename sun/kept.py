"""What lives as long as one sampling run, in every host: the negatives in force, the adapter's K and V, the calls."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .conditioning import AdapterTexts
from .layers import AttentionLayer

if TYPE_CHECKING:
    from .adapter import SunAdapter


class Interval(NamedTuple):
    """Sigmas between which something is in force; the default is always."""

    start: float = float("inf")
    end: float = 0.0

    def __contains__(self, sigma: object) -> bool:
        return isinstance(sigma, float) and self.end <= sigma <= self.start


ALWAYS = Interval()


class Negative(NamedTuple):
    """One negative text of a run: its weight among several, when it is in force, and its states [B, L, text_width]
    where the host does not carry them itself."""

    weight: float = 1.0
    when: Interval = ALWAYS
    text: Tensor | None = None


@dataclass(eq=False)
class SunRun:
    """One sampling run with an adapter.

    K and V of the texts are computed anew whenever anything they depend on is not exactly what it was: the texts
    (compared by value), their weights and mask, the strength, dtype or device, the guidance, or the adapter's weights.
    Those of an adapter in training, or with hooks on its projections, are never kept. What is kept is what would have
    been computed, bit for bit. Whoever begins a run ends it.
    """

    strength: float = 1.0
    """1 is the trained adapter, 0 changes nothing."""
    guidance: float | Tensor | None = None
    """w, a number or [B], of an adapter that takes it; None: the adapter's own."""
    negatives: tuple[Negative, ...] = ()
    effect: Interval = ALWAYS
    """When SUN acts at all."""
    layers: tuple[AttentionLayer, ...] = ()
    """The U-Net's cross-attention layers in the adapter's order, for hosts that find them by name."""
    calls: int = 0
    """U-Net calls so far; the host counts them."""
    answered: int = 0
    """Calls that never reached the U-Net, because somebody else answered them (caches); the host counts them too."""
    _kept: dict[Hashable, tuple[_MadeOf, AdapterTexts]] = field(default_factory=dict)

    def __deepcopy__(self, _memo: object) -> SunRun:
        """Itself: who copies a host's options in the middle of a run stays in that run."""
        return self

    @property
    def bounds(self) -> tuple[float, ...]:
        """Sigmas at which SUN, or one of its negatives, begins or ends to act."""
        intervals = {self.effect, *(negative.when for negative in self.negatives)}
        return tuple(sorted({end for interval in intervals for end in interval} - set(ALWAYS)))

    def weights(self, sigma: Tensor) -> dict[int, float]:
        """Weights, adding up to 1, of the negatives in force at this sigma [B], by position; none when SUN is not."""
        intervals = [self.effect, *(negative.when for negative in self.negatives)]
        # Reading sigma waits for the device: only where it matters.
        now = float(sigma.flatten()[0]) if any(interval != ALWAYS for interval in intervals) else 1.0
        if self.strength == 0.0 or now not in self.effect:
            return {}
        weights = {i: negative.weight for i, negative in enumerate(self.negatives) if now in negative.when}
        total = sum(weights.values())
        return {i: weight / total for i, weight in weights.items()} if total > 0 else {}

    def texts(
        self,
        adapter: SunAdapter,
        negatives: Sequence[tuple[float, Tensor]],
        positive: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        guidance: Tensor | None = None,
        key: Hashable = None,
    ) -> AdapterTexts:
        """``adapter.texts(...)`` at this run's strength, computed now or kept from an earlier step.

        negatives: (weight, embeddings [B, L, text_width]). positive: [B, L, text_width], for adapters with that branch.
        mask: over the positive text, as ``Branch.mask``. guidance: what ``adapter.guidance`` makes of w for the rows of
        this call, [1 or B, 2]; by default of the run's. key: names these texts among the several of a run (regions,
        sub-prompts); one set is kept for each. Raises ValueError as ``adapter.guidance`` and ``adapter.texts`` do.
        """
        if guidance is None:
            guidance = adapter.guidance(self.guidance)
        weights, texts = tuple(weight for weight, _ in negatives), tuple(text for _, text in negatives)

        def make() -> AdapterTexts:
            return adapter.texts(negatives, positive, strength=self.strength, positive_mask=mask, guidance=guidance)

        if adapter.training or _hooked(adapter) or (torch.is_grad_enabled() and _trained(adapter)):
            return make()
        tensors = tuple((tensor, _version(tensor)) for tensor in (*texts, positive, mask, guidance))
        made_of = _MadeOf(_state(adapter), self.strength, weights, autocast_dtype(texts[0].device.type), tensors)
        kept = self._kept.get(key)
        if kept is not None and kept[0].same(made_of):
            return kept[1]
        made = make()
        self._kept[key] = (made_of, made)
        return made

    def end(self) -> None:
        """Forget the texts and what was made of them: the run has ended, or another picture begins."""
        self._kept.clear()
        self.negatives = ()

    @property
    def kept(self) -> int:
        """How many sets of K and V are kept."""
        return len(self._kept)


class _MadeOf(NamedTuple):
    weights: tuple[tuple[int, int], ...]
    strength: float
    shares: tuple[float, ...]
    autocast: torch.dtype | None
    tensors: tuple[tuple[Tensor | None, int], ...]

    def same(self, other: _MadeOf) -> bool:
        if self[:-1] != other[:-1] or len(self.tensors) != len(other.tensors):
            return False
        by_value: list[tuple[Tensor, Tensor]] = []
        for (a, a_version), (b, b_version) in zip(self.tensors, other.tensors, strict=True):
            if a is None or b is None or a is b:
                if a is not b or a_version != b_version:  # one tensor may have been written to in between
                    return False
            elif (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
                return False
            else:
                by_value.append((a, b))
        if len({a.device for a, _ in by_value}) > 1:
            return all(torch.equal(a, b) for a, b in by_value)
        # One question to the device, which has to be waited for, however many texts there are.
        return not by_value or bool(torch.stack([(a == b).all() for a, b in by_value]).all())


def autocast_dtype(device: str) -> torch.dtype | None:
    """The number format that autocast computes in on a kind of device ("cuda", "cpu"), if it is on."""
    if device == "meta":
        return None
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # torch before 2.4, which web UIs still bring, asks by a function for each.
    if device == "cuda":
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    return torch.get_autocast_cpu_dtype() if device == "cpu" and torch.is_autocast_cpu_enabled() else None


def _trained(adapter: SunAdapter) -> bool:
    """Whether gradients are wanted: each backward pass needs K and V of its own."""
    return any(p.requires_grad for p in adapter.parameters())


def _version(tensor: Tensor | None) -> int:
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
