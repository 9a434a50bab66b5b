"""SUN in diffusers' attention processors: alone, or under an IP-Adapter's image attention."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from einops import rearrange
from torch import Tensor

from ..attention import attend, sun_attention
from ..conditioning import AdapterTexts, Branch, LayerTexts

NO_PICTURES = (
    "The attention layers of this U-Net are an IP-Adapter's, and the U-Net has no encoder_hid_proj for its pictures. "
    "Load the IP-Adapter with pipe.load_ip_adapter, or call pipe.unload_ip_adapter()."
)
# All compute the same attention, by different kernels; ours replaces any of them.
PLAIN_PROCESSORS = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)


class SunAttnProcessor:
    """Cross-attention with SUN: Z = Zp - g(Zn) [+ g'(Ze)], then the layer's own ``to_out`` (Eq. 6)."""

    def __init__(self, position: int, prior: Any) -> None:
        self.position, self.prior = position, prior

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sun_negative: AdapterTexts | None = None,
    ) -> Tensor:
        if sun_negative is None or encoder_hidden_states is None:
            return self.prior(attn, hidden_states, encoder_hidden_states, attention_mask)
        query, z_p = frozen_attention(attn, hidden_states, encoder_hidden_states, attention_mask)
        texts = for_rows(sun_negative.layers[self.position], encoder_hidden_states)
        z = sun_attention(query, z_p, texts, attn.heads)
        return attn.to_out[1](attn.to_out[0](z))


def frozen_attention(
    attn: Any, hidden_states: Tensor, text: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(query, Zp) [B, T, C] of a layer's own attention over ``text`` [B, L, D], before ``to_out``."""
    mask = _head_mask(attn, text, attention_mask)
    query = attn.to_q(hidden_states)
    return query, attend(query, attn.to_k(text), attn.to_v(text), attn.heads, mask)


def _head_mask(attn: Any, text: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    if attention_mask is None:
        return None
    rows, tokens = text.shape[:2]
    mask = attn.prepare_attention_mask(attention_mask, tokens, rows)
    return rearrange(mask, "(b h) t l -> b h t l", h=attn.heads)


def for_rows(texts: LayerTexts, text: Tensor) -> LayerTexts:
    """What a layer needs of the texts, for the rows of the positive ``text`` that it gets.

    FreeNoise's split inference hands a video's frames to a layer a few at a time, as views of the whole text.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a comparison would fix the number of rows
        return texts
    given, rows = (len(texts.branches[0].key) if texts.branches else 1), len(text)
    if given in (1, rows):
        return texts
    first = text.storage_offset() // text.stride(0)

    def cut(values: Tensor, dims: int) -> Tensor:
        return values if values.ndim < dims or len(values) == 1 else values[first : first + rows]

    branches = tuple(
        Branch(cut(b.key, 3), cut(b.value, 3), cut(b.scale, 3), None if b.mask is None else cut(b.mask, 4))
        for b in texts.branches
    )
    return LayerTexts(branches, None if texts.shift is None else cut(texts.shift, 3), texts.normalized)


# --------------------------------------------------------------------------------------- with an IP-Adapter's pictures


class _WithImages:
    """SUN in an IP-Adapter's processor, which stays what and where it is: a part of the U-Net that moves with it, and
    that ``set_ip_adapter_scale`` and ``unload_ip_adapter`` look for. Its attention over pictures is added to SUN's."""

    position: int
    _plain: Any

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Any = None,
        sun_negative: AdapterTexts | None = None,
    ) -> Tensor:
        given: tuple[Any, ...] = (hidden_states, encoder_hidden_states, attention_mask, temb, scale, ip_adapter_masks)
        if sun_negative is None:
            return self._plain.__call__(self, attn, *given)
        if not isinstance(encoder_hidden_states, tuple):
            raise ValueError(NO_PICTURES)
        text: Tensor = encoder_hidden_states[0]
        query, key, value = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        z_p = attend(query, key, value, attn.heads, _head_mask(attn, text, attention_mask))
        z = sun_attention(query, z_p, for_rows(sun_negative.layers[self.position], text), attn.heads)
        return self._plain.__call__(self, _Changed(attn, query, key, value, z - z_p), *given)


class _Changed:
    """A layer as an IP-Adapter's processor sees it: Q, K and V of the text are known, and SUN's change is added to
    what goes into ``to_out``."""

    def __init__(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, change: Tensor) -> None:
        self._attn = attn
        self.to_q, self.to_k, self.to_v = (lambda _x, made=made: made for made in (query, key, value))
        self.to_out = (lambda z: attn.to_out[0](z + change), attn.to_out[1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)


class SunIPAdapterAttnProcessor(_WithImages, IPAdapterAttnProcessor):
    _plain = IPAdapterAttnProcessor


class SunIPAdapterAttnProcessor2_0(_WithImages, IPAdapterAttnProcessor2_0):
    _plain = IPAdapterAttnProcessor2_0


class SunIPAdapterXFormersAttnProcessor(_WithImages, IPAdapterXFormersAttnProcessor):
    _plain = IPAdapterXFormersAttnProcessor


_WITH_SUN: dict[Any, Any] = {
    cls._plain: cls
    for cls in (SunIPAdapterAttnProcessor, SunIPAdapterAttnProcessor2_0, SunIPAdapterXFormersAttnProcessor)
}


# ----------------------------------------------------------------------------------------------------- in and out


def is_image_processor(processor: Any) -> bool:
    """Whether it is an IP-Adapter's, with SUN or without."""
    return isinstance(processor, tuple(_WITH_SUN))


def put_into(attention: Any, position: int) -> Any:
    """SUN's processor for the adapter's layer ``position``, now in ``attention``, over what is there."""
    there = attention.processor
    if isinstance(there, (SunAttnProcessor, _WithImages)):
        there.position = position
        return there
    if type(there) in _WITH_SUN:
        there.__class__ = _WITH_SUN[type(there)]
        there.position = position
        return there
    attention.processor = SunAttnProcessor(position, there)
    return attention.processor


def take_out(attention: Any) -> None:
    """The opposite of ``put_into``."""
    there = attention.processor
    if isinstance(there, SunAttnProcessor):
        attention.processor = there.prior
    elif isinstance(there, _WithImages):
        del there.position
        there.__class__ = type(there)._plain


def check_attention(name: str, attention: Any) -> None:
    """Raise ValueError, naming the layer and what to do, unless it is a plain cross-attention of SD 1.x, or one with
    an IP-Adapter."""
    processor = attention.processor
    prior = processor.prior if isinstance(processor, SunAttnProcessor) else processor
    if type(prior) not in (*PLAIN_PROCESSORS, *_WITH_SUN, *_WITH_SUN.values()):
        raise ValueError(
            f"{name} uses {type(prior).__name__}, which SUN cannot be combined with. Take away the feature that set it "
            "(pipe.unfuse_qkv_projections(), unet.set_default_attn_processor()), then call sun.attach again."
        )
    extras = (
        "spatial_norm",
        "group_norm",
        "norm_q",
        "norm_k",
        "norm_cross",
        "added_kv_proj_dim",
        "residual_connection",
    )
    found = [extra for extra in extras if getattr(attention, extra, None)]
    if found or attention.rescale_output_factor != 1.0:
        raise ValueError(f"{name} is not Stable Diffusion 1.x's cross-attention ({', '.join(found)}). SUN needs that.")
