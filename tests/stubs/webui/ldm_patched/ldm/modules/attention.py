"""reForge's and Forge Classic's attention kernel: (q, k, v, heads, mask=None, ...), heads not split."""

from ldm_unet import attention

optimized_attention = attention
