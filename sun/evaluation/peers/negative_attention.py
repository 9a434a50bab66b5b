"""Training-free methods that subtract the negative prompt inside cross-attention (NASA, NAG): what they share.

Both take the frozen layer's own keys and values of the negative text, Zn = Attn(Q, E(neg) W_k, E(neg) W_v), and
combine Zn with Zp before ``to_out``. They differ in the formula alone, which the caller gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...attention import attend
from ...layers import layers_of_unet
from ...pipelines.attach import pipeline_and_unet
from ...pipelines.processors import PLAIN_PROCESSORS, check_attention, frozen_attention
from ...pipelines.unet import fit_negative, keep_from_self_attention

ARGUMENT = "negative"
"""Name under which the negative text states [B, L, D] travel in ``cross_attention_kwargs``."""

Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(Zp, Zn), both [B, T, C] -> Z [B, T, C]."""


class NegativeAttnProcessor:
    """Cross-attention with Z = combine(Zp, Zn), then the layer's own ``to_out``; without a negative, as before."""

    def __init__(self, combine: Combine, prior: Any) -> None:
        self.combine, self.prior = combine, prior

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        negative: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if negative is None or encoder_hidden_states is None:
            return self.prior(attn, hidden_states, encoder_hidden_states, attention_mask)
        negative = fit_negative(negative, encoder_hidden_states, attn.cross_attention_dim, ARGUMENT)
        query, z_p = frozen_attention(attn, hidden_states, encoder_hidden_states, attention_mask)
        z_n = attend(query, attn.to_k(negative), attn.to_v(negative), attn.heads)
        return attn.to_out[1](attn.to_out[0](self.combine(z_p, z_n).to(z_p.dtype)))


@dataclass(eq=False)
class _Attachment:
    """What is installed on a U-Net: the method's name, its processors by layer, the hooks of self-attention."""

    method: str
    processors: dict[str, NegativeAttnProcessor]
    hooks: list[Any] = field(default_factory=list)


def attach_negative_attention(target: Any, method: str, combine: Combine) -> None:
    """Install ``combine`` in every cross-attention of a diffusers SD 1.x U-Net (or a pipeline's), for ``method``.

    Replaces whatever this function installed before. Raises TypeError for anything but such a U-Net or pipeline,
    ValueError where another feature already replaced the attention processors.
    """
    _, unet = pipeline_and_unet(target)
    detach_negative_attention(unet)
    modules = {layer.diffusers: unet.get_submodule(layer.diffusers) for layer in layers_of_unet(unet)}
    for name, attention in modules.items():
        if type(attention.processor) not in PLAIN_PROCESSORS:
            raise ValueError(
                f"{name} uses {type(attention.processor).__name__}, which {method} cannot be combined with. Take that "
                "off first (sun.detach, pipe.unload_ip_adapter()), then attach again."
            )
        check_attention(name, attention)
    attachment = _Attachment(method, {n: NegativeAttnProcessor(combine, a.processor) for n, a in modules.items()})
    for name, attention in modules.items():
        attention.processor = attachment.processors[name]
    attachment.hooks += keep_from_self_attention(unet, ARGUMENT)
    unet._negative_attention = attachment


def detach_negative_attention(target: Any, method: str = "") -> None:
    """Restore the processors that were there before; only if ``method`` is what is installed, where it is given."""
    _, unet = pipeline_and_unet(target)
    attachment = unet.__dict__.get("_negative_attention")
    if attachment is None or method not in ("", attachment.method):
        return
    for name, processor in attachment.processors.items():
        attention = unet.get_submodule(name)
        if attention.processor is processor:  # else someone replaced it since; theirs stays
            attention.processor = processor.prior
    for hook in attachment.hooks:
        hook.remove()
    del unet._negative_attention
