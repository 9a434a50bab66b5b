"""Forge's attention kernel: (q, k, v, heads, mask=None), heads not split."""

from ldm_unet import attention

attention_function = attention
