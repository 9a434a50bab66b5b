"""One picture run with SUN: its settings, its adapter, and the negative text in force, without any host's names."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..sun.attention import Attend, attend, sun_attention
from ..sun.conditioning import repeated_in_turn
from ..sun.files import SunFileError
from ..sun.kept import Negative, SunRun
from ..sun.layers import AttentionLayer, layers_of_ldm
from . import store
from .choices import SunSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..sun.adapter import SunAdapter
    from ..sun.conditioning import AdapterTexts, LayerTexts

UNCONDITIONAL = -1


@dataclass(eq=False)
class WebuiRun(SunRun):
    """State of one run. Lives on the processing object and is dropped with it."""

    settings: SunSettings = field(default_factory=lambda: SunSettings(""))
    adapter: SunAdapter | None = None
    error: Exception | None = None
    """What went wrong while preparing: hosts swallow exceptions of scripts, so it is raised where they do not."""
    guarded: bool = False
    """Whether the sampler in use was made to call SUN, or to raise `error`."""
    schedules: Any = None
    """The encoded negative prompt over the steps, as the host's prompt parser keeps it."""
    layer_calls: int = 0
    _seen: dict[Any, list[tuple[torch.Tensor | None, AdapterTexts]]] = field(default_factory=dict)
    """By the rows of a call of the U-Net: the positive texts of this step and what the adapter made of them."""

    @property
    def images(self) -> int:
        """How many images the step that runs now paints."""
        return 0 if not self.negatives else self._negative.shape[0]

    @property
    def _negative(self) -> torch.Tensor:
        text = self.negatives[0].text
        assert text is not None
        return text

    def use_negative(self, text: torch.Tensor) -> None:
        """Takes the negative text [B, L, width] for the step that begins, one row an image."""
        self.negatives = (Negative(text=text),)
        self._seen.clear()

    def end(self) -> None:
        super().end()
        self._seen.clear()

    def change(
        self,
        position: int,
        query: torch.Tensor,
        z_p: torch.Tensor,
        positive: torch.Tensor | None,
        heads: int,
        images: Sequence[int],
        attend: Attend = attend,
    ) -> torch.Tensor:
        """Z before ``to_out`` of the adapter's layer at `position`; all tensors are [rows, T or L, C or width].

        images: which image each row paints, UNCONDITIONAL for rows that SUN leaves alone.
        """
        if self.adapter is None or not self.negatives:
            raise RuntimeError("SUN: the U-Net was called outside of a step. Please report this with the log.")
        if not images:
            raise ValueError("SUN: the U-Net was called with an empty batch.")
        self.layer_calls += 1
        acting = [row for row, image in enumerate(images) if image != UNCONDITIONAL]
        if not acting:
            return z_p
        texts = self._texts(position, query, positive, tuple(images), acting)
        if len(acting) == len(images):
            return sun_attention(query, z_p, texts, heads, attend)
        result = z_p.clone()
        result[acting] = sun_attention(query[acting], z_p[acting], texts, heads, attend)
        return result

    def _texts(
        self,
        position: int,
        query: torch.Tensor,
        positive: torch.Tensor | None,
        images: tuple[int, ...],
        acting: list[int],
    ) -> LayerTexts:
        """What the layer needs of the texts of the rows that act. The first layer of a call decides for all of them;
        to another text, which hypernetworks give each layer, a layer is asked itself."""
        assert self.adapter is not None
        if not self.adapter.positive:
            positive = None
        whole = len(acting) == len(images)
        rows = query.shape[0] if whole else len(acting)
        place = (images, rows, query.device, query.dtype)
        seen = self._seen.setdefault(place, [])
        for text, made in seen:
            if text is positive:
                return made.layers[position]
        adapter = store.on(self.adapter, query.device, query.dtype)
        negative = self._negative.to(query)[[images[row] for row in acting]]
        negatives = [(1.0, repeated_in_turn(negative, rows))]
        fitted = positive
        if positive is not None:
            fitted = repeated_in_turn((positive if whole else positive[acting]).to(query), rows)
        if position == 0:
            seen.append((positive, self.texts(adapter, negatives, fitted, key=(place, len(seen)))))
            return seen[-1][1].layers[0]
        guidance = adapter.guidance(self.guidance)
        return adapter.sun_layers()[position].texts(negatives, fitted, strength=self.strength, guidance=guidance)


def batch_was_changed(rows: int, size: int) -> RuntimeError:
    """For U-Net calls of `rows` rows in a step whose rows are known to be `size`."""
    return RuntimeError(
        f"SUN: the U-Net got {rows} rows in a step of {size}; another extension changed the batch. Switch it off."
    )


class Base(NamedTuple):
    """What an adapter has to fit."""

    layers: tuple[AttentionLayer, ...]
    text_width: int

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(layer.channels for layer in self.layers)


def base_of(unet: Any, where: str) -> Base:
    """The cross-attention layers of an LDM U-Net. Raises SunFileError where it is not of Stable Diffusion 1.x."""
    try:
        layers = layers_of_ldm(unet)
    except ValueError as error:
        raise SunFileError(
            f"SUN works on Stable Diffusion 1.x models, and {where} is none ({error}) Choose an SD 1.5 checkpoint."
        ) from error
    to_k = unet.get_submodule(layers[0].ldm).to_k
    return Base(tuple(layers), getattr(to_k, "in_features", None) or to_k.weight.shape[-1])


_current: list[WebuiRun] = []


@contextmanager
def active(run: WebuiRun) -> Iterator[None]:
    """Makes `run` the one whose steps the host's callbacks serve. Hosts sample one thing at a time."""
    _current.append(run)
    try:
        yield
    finally:
        _current.remove(run)


def current() -> WebuiRun | None:
    """The run that is being sampled now."""
    return _current[-1] if _current else None
