"""Control-LoRA: a ControlNet (arXiv 2302.05543) whose encoder is the model's own plus a change of low rank.

The file has the layout that ComfyUI's own ControlNet loader knows by the key ``lora_controlnet``: LDM names, ``up`` and
``down`` for the encoder's layers, whole weights for the layers only a ControlNet has. diffusers has no such class; here
it becomes an ordinary ``ControlNetModel``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MARK = "lora_controlnet"
OWN_LAYERS = ("controlnet_",)  # diffusers' names of the layers a U-Net does not have begin so
_LAYERS_PER_STAGE = 2
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_name(name: str) -> str:
    """LDM's name of a tensor of a diffusers ``ControlNetModel`` of the SD 1.x kind. Raises KeyError for others."""
    block = _LAYERS_PER_STAGE + 1  # of LDM's blocks, a stage has its layers and one that halves the picture
    if match := re.fullmatch(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.+)", name):
        stage, kind, number, rest = int(match[1]), match[2], int(match[3]), match[4]
        if kind == "downsamplers":
            return f"input_blocks.{block * (stage + 1)}.0.{rest.replace('conv.', 'op.', 1)}"
        place = f"input_blocks.{block * stage + number + 1}"
        return f"{place}.0.{_resnet(rest)}" if kind == "resnets" else f"{place}.1.{rest}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        if match[1] == "attentions":
            return f"middle_block.1.{match[3]}"
        return f"middle_block.{2 * int(match[2])}.{_resnet(match[3])}"
    if match := re.fullmatch(r"controlnet_cond_embedding\.blocks\.(\d+)\.(.+)", name):
        return f"input_hint_block.{2 * int(match[1]) + 2}.{match[2]}"
    if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)\.(.+)", name):
        return f"zero_convs.{match[1]}.0.{match[2]}"
    layer, _, rest = name.rpartition(".")
    return f"{_SINGLE[layer]}.{rest}"


_SINGLE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
}


def _resnet(rest: str) -> str:
    part, _, tensor = rest.partition(".")
    return f"{_RESNET[part]}.{tensor}"


def to_control_lora(changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's content for changes (:func:`~sun.shipped.lowrank.changes_of`) of a ControlNetModel from a U-Net."""
    return {MARK: torch.zeros(0), **{ldm_name(name): tensor for name, tensor in changes.items()}}


def controlnet_from_unet(unet: Any, file: str | Path) -> Any:
    """The ``ControlNetModel`` that a Control-LoRA makes of a diffusers U-Net, with the U-Net's dtype and device.

    Load it before LoRAs and before SUN is attached. Raises ValueError, saying why, if the two do not fit.
    """
    from diffusers import ControlNetModel
    from safetensors import safe_open
    from safetensors.torch import load_file

    from .lowrank import merge

    if unet.config.in_channels != 4:
        raise ValueError("a Control-LoRA needs a U-Net with 4 input channels; inpainting models have 9.")
    with safe_open(str(file), "pt") as header:
        marked = MARK in header.keys()  # noqa: SIM118  (no dictionary)
    if not marked:  # known before anything of a large file is read
        raise ValueError(f"{file} is not a Control-LoRA (it has no {MARK}).")
    content = {name: tensor for name, tensor in load_file(str(file)).items() if name != MARK}
    controlnet = ControlNetModel.from_unet(unet)
    try:
        names = {ldm_name(name): name for name in controlnet.state_dict()}
    except KeyError as error:
        raise ValueError(f"a Control-LoRA needs a Stable Diffusion 1.x U-Net; this one has {error}.") from error
    layers = {ldm.removesuffix(".weight"): name.removesuffix(".weight") for ldm, name in names.items()}
    changes: dict[str, Tensor] = {}
    for ldm, tensor in content.items():
        layer, _, part = ldm.rpartition(".")
        # A name nobody knows is kept as it is: merge() then says that this is another model's.
        changes[names.get(ldm) or f"{layers.get(layer, layer)}.{part}"] = tensor
    own = controlnet.state_dict()
    merged = merge(own, changes, Path(file).name)
    if other := next((name for name in own if merged[name].shape != own[name].shape), None):
        raise ValueError(
            f"{Path(file).name} is for a base model of another size: {other} is {list(own[other].shape)} here and "
            f"{list(merged[other].shape)} there."
        )
    controlnet.load_state_dict(merged)
    return controlnet.to(device=unet.device, dtype=unet.dtype).eval()
