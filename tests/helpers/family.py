"""Tiny U-Nets laid out as Stable Diffusion 1.x, 2.x and SDXL, random but seeded, every layer active."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
KINDS: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (16, 32, 64, 64),
        "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
        "attention_head_dim": 2,
    },
    "sd2": {
        "block_out_channels": (16, 32, 64, 64),
        "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
        "attention_head_dim": (1, 2, 4, 4),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (16, 32, 64),
        "down_block_types": (PLAIN, CROSS, CROSS),
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 3),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 16,
    },
}
TEXT = 16


def family_unet(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A ``UNet2DConditionModel`` of ``kind`` ("sd1", "sd2", "sdxl"), 8 x 8 latents, texts 16 wide."""
    config = {"sample_size": 8, "cross_attention_dim": TEXT, "norm_num_groups": 8, **KINDS[kind], **changes}
    config.setdefault("up_block_types", tuple(k.replace("Down", "Up") for k in reversed(config["down_block_types"])))
    torch.manual_seed(seed)
    return UNet2DConditionModel(**config).eval()
