"""Experts on a U-Net in LDM layout, as ComfyUI, A1111 and Forge build it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .experts import Experts
from .ldm import ldm_name
from .mixing import Mixing


def mixing_of(unet: Any, experts: Experts) -> Mixing:
    """Experts put on ``unet`` (with ``input_blocks`` and so on). Raises CompactError where they are for another."""
    convolutions: dict[str, nn.Module] = {}
    layers: dict[str, nn.Module] = {}
    for name, _ in experts.by_name():
        place = ldm_name(f"{name}.weight", experts.shape).removesuffix(".weight")
        # input_blocks.4.0.out_layers.3: the layer is what holds out_layers
        layer = place.rsplit(".", 2)[0]
        try:
            convolutions[name], layers[name] = unet.get_submodule(place), unet.get_submodule(layer)
        except AttributeError:
            continue  # the experts say that it is not there
    return Mixing(experts, convolutions, layers)
