"""NAG: Normalized Attention Guidance, training-free negative prompts in one U-Net row (arXiv 2505.21179)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .negative_attention import attach_negative_attention, detach_negative_attention

METHOD = "NAG"


def normalized_guidance(
    z_p: torch.Tensor, z_n: torch.Tensor, phi: float, tau: float, alpha: float, eps: float = 1e-6
) -> torch.Tensor:
    """Extrapolate away from Zn, limit how far each token grew, and blend with Zp; all [B, T, C], float32 inside.

    Z~ = Zp + phi (Zp - Zn);  R = ||Z~||_1 / ||Zp||_1 per token;  Z^ = min(R, tau) / R Z~;
    Z = alpha Z^ + (1 - alpha) Zp.
    """
    dtype = torch.promote_types(z_p.dtype, torch.float32)  # an L1 norm over channels overflows float16
    z_p, z_n = z_p.to(dtype), z_n.to(dtype)
    extrapolated = z_p + phi * (z_p - z_n)
    norm_p, norm_e = (torch.linalg.vector_norm(z, ord=1, dim=-1, keepdim=True) for z in (z_p, extrapolated))
    ratio = norm_e / norm_p.clamp(min=eps)
    limited = extrapolated * (tau / ratio.clamp(min=tau))  # min(R, tau) / R, without 0 / 0
    return alpha * limited + (1 - alpha) * z_p


def attach_nag(unet: Any, phi: float = 2.0, tau: float = 2.5, alpha: float = 0.375) -> None:
    """Put NAG on a diffusers SD 1.x U-Net, replacing NASA or NAG put there before.

    The U-Net then takes negative text states [B or 1, L, D] through ``cross_attention_kwargs={"negative": states}``,
    one row a picture, and without them behaves as before. The defaults are those of Stable Diffusion 1.5: ``phi``
    the extrapolation, ``tau`` the largest growth of a token's L1 norm, ``alpha`` the share of the result.

    Raises ValueError for settings outside phi >= 0, tau > 0, 0 <= alpha <= 1, or if SUN, an IP-Adapter or another
    custom attention is on the U-Net; TypeError for anything but an SD 1.x U-Net or pipeline.
    """
    if not (phi >= 0 and tau > 0 and 0 <= alpha <= 1):
        raise ValueError(f"NAG needs phi >= 0, tau > 0 and 0 <= alpha <= 1, not phi={phi}, tau={tau}, alpha={alpha}.")
    attach_negative_attention(unet, METHOD, partial(normalized_guidance, phi=phi, tau=tau, alpha=alpha))


def detach_nag(unet: Any) -> None:
    """Take NAG off and restore the attention processors; without it, do nothing."""
    detach_negative_attention(unet, METHOD)
