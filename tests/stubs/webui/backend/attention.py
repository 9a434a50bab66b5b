"""Forge's attention kernel: (q, k, v, heads, mask=None), heads not split (hosts.md F.6)."""

from ldm_unet import attention

attention_function = attention
