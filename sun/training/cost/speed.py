"""What makes training faster on a given device without changing what is computed."""

from __future__ import annotations

from typing import Any

import torch


def use_fast_attention(unet: Any, device: torch.device) -> None:
    """On CPUs, let ``unet``'s attention be plain matrix products instead of the fused kernel.

    The fused kernel's backward takes a quarter of a training step there; without it a step of Emoji Diffusion is 1.4
    times as fast. Call it before SUN is attached. Accelerators keep the fused kernel.
    """
    if device.type == "cpu":
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())
