"""NASA: Negative-Away Steer Attention, training-free negative prompts in one U-Net row (SNOOPI, arXiv 2412.02687).

SUN without training and without Attention Normalization: the frozen layer's own keys and values, one constant.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .negative_attention import attach_negative_attention, detach_negative_attention

METHOD = "NASA"


def steer_away(z_p: torch.Tensor, z_n: torch.Tensor, scale: float) -> torch.Tensor:
    """Z = Zp - a Zn; all [B, T, C]."""
    return z_p - scale * z_n


def attach_nasa(unet: Any, scale: float = 0.1) -> None:
    """Put NASA on a diffusers SD 1.x U-Net, replacing NASA or NAG put there before.

    The U-Net then takes negative text states [B or 1, L, D] through ``cross_attention_kwargs={"negative": states}``,
    one row a picture, and without them behaves as before. ``scale`` is a, 0.1 on Stable Diffusion 1.5; 0 gives the
    plain conditional U-Net.

    Raises TypeError for anything but an SD 1.x U-Net or pipeline, ValueError if SUN, an IP-Adapter or another custom
    attention is on it.
    """
    attach_negative_attention(unet, METHOD, partial(steer_away, scale=scale))


def detach_nasa(unet: Any) -> None:
    """Take NASA off and restore the attention processors; without it, do nothing."""
    detach_negative_attention(unet, METHOD)
