"""Experts on a U-Net in LDM layout, as ComfyUI, A1111 and Forge build it."""

from __future__ import annotations

from typing import Any

from .experts import Experts
from .ldm import ldm_name
from .mixing import Mixing, put_on


def mixing_of(unet: Any, experts: Experts) -> Mixing:
    """Experts put on ``unet`` (with ``input_blocks`` and so on). Raises CompactError where they are for another."""

    def place_of(name: str) -> tuple[str, str]:
        conv = ldm_name(f"{name}.weight", experts.shape).removesuffix(".weight")
        return conv, conv.rsplit(".", 2)[0]  # input_blocks.4.0.out_layers.3 is in input_blocks.4.0

    return put_on(unet, experts, place_of)
