"""The attention arithmetic of SUN (paper Eq. 4-6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from .conditioning import LayerTexts


class Attend(Protocol):
    """A host's attention kernel: query [B, T, C], key and value [B, L, C] -> [B, T, C], heads not split."""

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor: ...


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Multi-head attention by torch's kernel.

    query [B, T, C]; key, value [B, L, C]; mask broadcasts to [B, heads, T, L] -> [B, T, C].
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    if mask is None and q.device.type == "cpu" and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        # Training on a CPU: the fused kernel's backward is slower there than these two products and a softmax.
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return (weights.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(-2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2)


def attention_normalization(
    z_n: torch.Tensor, z_p: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """Attention Normalization: g(Zn) = alpha * Zn * ||Zp|| / ||Zn|| + beta (Eq. 5).

    z_n, z_p [B, T, C]; alpha, beta [C], or [B, 1, C] where images differ. The norms are Frobenius norms over one image
    (tokens and channels), so that a picture does not depend on its batch mates, and everything is computed in float32
    or better. A branch that is zero gives beta. Returns [B, T, C] in float32 (float64 for float64 input).
    """
    dtype = torch.promote_types(z_p.dtype, torch.float32)
    norm_p = torch.linalg.vector_norm(z_p, dim=(-2, -1), keepdim=True, dtype=dtype)
    norm_n = torch.linalg.vector_norm(z_n, dim=(-2, -1), keepdim=True, dtype=dtype)
    alpha = alpha.to(device=z_n.device, dtype=dtype)
    beta = beta.to(device=z_n.device, dtype=dtype)
    return z_n.to(dtype) * (alpha * (norm_p / norm_n.clamp(min=eps))) + beta


def steer(
    z_p: torch.Tensor,
    attended: Sequence[tuple[torch.Tensor, torch.Tensor]],
    shift: torch.Tensor,
    normalized: bool = True,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Z = Zp + sum over branches of scale * Zb * ||Zp|| / ||Zb|| + shift: Eq. 4-6 and the release's third term.

    The same as adding and subtracting ``attention_normalization`` of each branch, in few passes over [B, T, C]: at
    512 x 512 these are as costly as the attention over 77 words. z_p, Zb: [B, T, C]; scale and shift: [C], or
    [B, 1, C] where images differ, in float32 or better, with the signs in them. normalized=False leaves the norms out
    (Fig. 8). Norms and sum are float32 or better; returns z_p's dtype.
    """
    dtype = torch.promote_types(z_p.dtype, torch.float32)
    norm_p = torch.linalg.vector_norm(z_p, dim=(-2, -1), keepdim=True, dtype=dtype) if normalized else None
    z, own = z_p, False
    for z_b, scale in attended:
        if norm_p is not None:
            norm_b = torch.linalg.vector_norm(z_b, dim=(-2, -1), keepdim=True, dtype=dtype)
            scale = scale * (norm_p / norm_b.clamp(min=eps))
        z = z.addcmul_(z_b, scale) if own else torch.addcmul(z, z_b, scale.to(dtype))
        own = not torch.is_grad_enabled()  # z is ours now: what autograd does not need may be written over
    return (z.add_(shift) if own else z + shift).to(z_p.dtype)


def sun_attention(
    query: torch.Tensor, z_p: torch.Tensor, texts: LayerTexts, heads: int, attend: Attend = attend
) -> torch.Tensor:
    """Z = Zp - g(Zn) [+ g'(Ze)] of one layer, before its ``to_out`` (Eq. 6 and the release's third term).

    query, z_p: [B, T, C], the frozen layer's query and attention output. attend: the host's attention kernel; where a
    text has a mask, it takes that as its fifth argument. K and V follow the query: an adapter that is trained is kept
    in float32. Without any text, Zp itself is returned.
    """
    if texts.shift is None:
        return z_p
    attended = []
    for branch in texts.branches:
        mask = () if branch.mask is None else (branch.mask.to(query),)
        attended.append((attend(query, branch.key.to(query), branch.value.to(query), heads, *mask), branch.scale))
    return steer(z_p, attended, texts.shift, texts.normalized)
