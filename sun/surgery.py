"""Adapters made of others: for a U-Net, with one guidance scale fixed in the weights, or taking the guidance scale."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .adapter import SunAdapter, SunLayer
from .files import SunInfo
from .layers import layers_of_unet


def from_unet(
    unet: Any,
    positive: bool = True,
    alpha: float = 0.5,
    w: float | None = None,
    *,
    beta: float = 0.0,
    info: SunInfo | None = None,
    dtype: torch.dtype | None = None,
    guided: bool = False,
) -> SunAdapter:
    """A new adapter for a diffusers U-Net, its K and V copied from the U-Net's own cross-attention.

    With ``alpha`` small the student starts near the frozen conditional output. ``w``, the guidance scale it will be
    trained for, is only recorded. guided: the adapter takes the guidance scale as an input. Device and, unless given,
    dtype are the U-Net's.
    """
    layers = layers_of_unet(unet)
    attentions = [unet.get_submodule(layer.diffusers) for layer in layers]
    known = info or SunInfo()
    adapter = SunAdapter(
        [layer.channels for layer in layers],
        attentions[0].to_k.in_features,
        positive,
        names=[layer.name for layer in layers],
        info=known if w is None else replace(known, guidance_scale=w),
        device=attentions[0].to_k.weight.device,
        dtype=dtype or attentions[0].to_k.weight.dtype,
        guided=guided,
    )
    with torch.no_grad():
        for layer, attention in zip(adapter.sun_layers(), attentions, strict=True):
            for branch in ("neg", "pos") if positive else ("neg",):
                getattr(layer, f"to_k_{branch}").weight.copy_(attention.to_k.weight)
                getattr(layer, f"to_v_{branch}").weight.copy_(attention.to_v.weight)
                getattr(layer, f"alpha_{branch}").fill_(alpha)
                getattr(layer, f"beta_{branch}").fill_(beta)
    return adapter


def bake(adapter: SunAdapter, scale: float) -> SunAdapter:
    """A plain adapter that has the guidance scale ``scale`` fixed in its weights.

    Raises ValueError for a scale that ``adapter`` cannot take.
    """
    features = adapter.guidance(scale)
    plain = SunAdapter(
        adapter.channels,
        adapter.text_width,
        adapter.positive,
        names=adapter.names,
        info=replace(adapter.info, guidance_scale=scale),
    )
    with torch.no_grad():
        for guided, own in zip(adapter.sun_layers(), plain.sun_layers(), strict=True):
            state = {k: v for k, v in guided.state_dict().items() if not k.endswith("_w")}
            for name in [k for k in state if k.startswith(("alpha", "beta"))]:
                state[name] = guided.factor(name, features).reshape(-1).to(state[name].dtype)
            own.load_state_dict(state, assign=True)
    return plain.eval()


def widen(adapter: SunAdapter, w: float | None = None, *, growing: bool = False) -> SunAdapter:
    """An adapter that takes the guidance scale. Until it is trained to, it does what ``adapter`` does at every scale.

    w: the scale it was made for, from which others are counted, where its file does not record it (the authors' do
    not). growing: alpha and beta are in proportion to scale - 1 instead, as what guidance adds is, to the second order
    in log(scale / w). An adapter made for a scale of 1, where guidance adds nothing, stays the same at all of them, and
    one that takes the scale already keeps what it learned. Raises ValueError where neither scale is known.
    """
    own = adapter.info.guidance_scale or w
    if not own:
        raise ValueError("The adapter's file does not record the guidance scale it was trained for; state it.")
    state = adapter.state_dict()
    like = state["layers.0.alpha_neg"]
    wide = SunAdapter(
        adapter.channels,
        adapter.text_width,
        adapter.positive,
        names=adapter.names,
        info=replace(adapter.info, guidance_scale=own),
        device=like.device,
        dtype=like.dtype,
        guided=True,
    )
    wide.load_state_dict(state, strict=adapter.guided)
    if growing and not adapter.guided and own != 1:
        with torch.no_grad():
            for layer, name, slope in _slopes(wide):
                plain = getattr(layer, name)
                slope.copy_(torch.stack([plain, plain / 2]) * (own / (own - 1)))
    return wide.eval()


def recentre(adapter: SunAdapter, w: float) -> SunAdapter:
    """The same adapter, with ``w`` as the guidance scale it takes by default and counts others from.

    Nothing changes at any scale: alpha and beta are a + s1 u + s2 u^2 in u = log(scale / w0), rewritten for another w0.
    Raises ValueError for an adapter of one fixed scale, and for a w that is no positive number.
    """
    step = adapter.guidance(w)  # of the scale by default as seen from the old one
    if step is None:
        return adapter
    moved = copy.deepcopy(adapter)
    with torch.no_grad():
        for layer, name, (linear, square) in _slopes(moved):
            getattr(layer, name).copy_(layer.factor(name, step).reshape(-1))
            linear.add_(2 * float(step[0, 0]) * square)
    moved.info = replace(adapter.info, guidance_scale=w)
    return moved


def strengthen(adapter: SunAdapter, strength: float) -> SunAdapter:
    """The same adapter with ``strength`` in its weights: at strength 1 it does what ``adapter`` does at that one.

    Raises ValueError for a strength that is no finite number.
    """
    if not math.isfinite(strength):
        raise ValueError(f"strength must be a finite number, not {strength}.")
    scaled = copy.deepcopy(adapter)
    with torch.no_grad():
        for layer in scaled.sun_layers():
            for name, parameter in layer.named_parameters(recurse=False):
                if name.startswith(("alpha", "beta")):
                    parameter.mul_(strength)
    return scaled


def _slopes(adapter: SunAdapter) -> Iterator[tuple[SunLayer, str, torch.Tensor]]:
    """Each alpha and beta of an adapter that takes the scale: its layer, its name there, its two slopes [2, C]."""
    for layer in adapter.sun_layers():
        for name, slope in layer.named_parameters(recurse=False):
            if name.endswith("_w"):
                yield layer, name.removesuffix("_w"), slope
