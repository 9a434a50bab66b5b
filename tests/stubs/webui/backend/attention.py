"""Forge's attention kernel: (q, k, v, heads, mask=None), heads not split (hosts.md F.6)."""
