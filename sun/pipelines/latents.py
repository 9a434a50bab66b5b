"""Latents of an autoencoder: how many pixels one stands for."""

from __future__ import annotations

from typing import Any


def latent_scale(vae: Any) -> int:
    """Pixels to a side of one latent: 8 for Stable Diffusion's autoencoders."""
    stages = vae.config.get("decoder_block_out_channels") or vae.config.block_out_channels
    return int(2 ** (len(stages) - 1))
