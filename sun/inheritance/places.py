"""The parts of a U-Net under names that are the same in every host.

``down.1.0`` is the first layer of the second stage on the way down, ``down.1.sample`` its downsampler, ``mid`` the
middle, ``up.3.2`` the last layer on the way up. A layer is a ResBlock and, where the stage has one, a transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .plan import InheritanceError


@dataclass(frozen=True)
class Part:
    """A module that may be left out. ``base`` gives what a residual is added to, for parts that add one."""

    name: str
    module: nn.Module
    base: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Block:
    """A layer, a resampler or the middle: its parts in the order they run."""

    name: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Places:
    """inputs[i] and outputs[-1 - i] share a skip connection. ``stage_ends[k]``: blocks that k + 1 outer stages have."""

    inputs: tuple[Block, ...]
    middle: Block
    outputs: tuple[Block, ...]
    stage_ends: tuple[int, ...]

    @property
    def layers(self) -> dict[str, Block]:
        """Layers by name, in forward order."""
        every = (*self.inputs[1:], *self.outputs)
        return {block.name: block for block in every if not block.name.endswith(".sample")}

    def units(self) -> dict[str, Part]:
        """ResBlocks, transformers and their attentions and feed-forwards by name."""
        return {part.name: part for block in self.layers.values() for part in _units(block)}


def places_of(unet: nn.Module) -> Places:
    """The places of a diffusers ``UNet2DConditionModel`` or an LDM U-Net (ComfyUI, A1111, Forge).

    Raises InheritanceError for another network.
    """
    unet = getattr(unet, "_orig_mod", unet)
    if hasattr(unet, "down_blocks") and hasattr(unet, "conv_in"):
        places = _of_diffusers(unet)
    elif hasattr(unet, "input_blocks") and hasattr(unet, "output_blocks"):
        places = _of_ldm(unet)
    else:
        raise InheritanceError(
            f"Feature inheritance works on the U-Nets of Stable Diffusion 1.x, 2.x and SDXL, not on a "
            f"{type(unet).__name__}. LTC-Accel works on any model."
        )
    if len(places.inputs) != len(places.outputs):
        raise InheritanceError(
            f"This {type(unet).__name__} has {len(places.inputs)} blocks down and {len(places.outputs)} up; feature "
            "inheritance knows U-Nets that have equally many."
        )
    return places


def _of_diffusers(unet: Any) -> Places:
    inputs = [Block("conv_in", (Part("conv_in", unet.conv_in),))]
    ends = []
    for s, stage in enumerate(unet.down_blocks):
        attentions = getattr(stage, "attentions", None) or [None] * len(stage.resnets)
        for j, (resnet, attention) in enumerate(zip(stage.resnets, attentions, strict=True)):
            inputs.append(Block(f"down.{s}.{j}", _pair(f"down.{s}.{j}", resnet, attention)))
        ends.append(len(inputs))
        for module in getattr(stage, "downsamplers", None) or []:
            inputs.append(Block(f"down.{s}.sample", (Part(f"down.{s}.sample", module),)))
    outputs = []
    for s, stage in enumerate(unet.up_blocks):
        attentions = getattr(stage, "attentions", None) or [None] * len(stage.resnets)
        for j, (resnet, attention) in enumerate(zip(stage.resnets, attentions, strict=True)):
            outputs.append(Block(f"up.{s}.{j}", _pair(f"up.{s}.{j}", resnet, attention)))
        more = tuple(Part(f"up.{s}.sample", module) for module in getattr(stage, "upsamplers", None) or [])
        outputs[-1] = Block(outputs[-1].name, (*outputs[-1].parts, *more))
    mid = unet.mid_block
    inner = [] if mid is None else [*mid.resnets, *(m for m in getattr(mid, "attentions", None) or [] if m is not None)]
    parts = tuple(Part(f"mid.{i}", module) for i, module in enumerate(inner))
    return Places(tuple(inputs), Block("mid", parts), tuple(outputs), tuple(ends))


def _of_ldm(unet: Any) -> Places:
    inputs, ends = [Block("conv_in", (Part("conv_in", unet.input_blocks[0]),))], []
    stage = layer = 0
    for block in list(unet.input_blocks)[1:]:
        modules = list(block)
        if hasattr(modules[0], "in_layers"):
            name = f"down.{stage}.{layer}"
            inputs.append(Block(name, _pair(name, modules[0], modules[1] if len(modules) > 1 else None)))
            layer += 1
        else:
            ends.append(len(inputs))
            inputs.append(Block(f"down.{stage}.sample", (Part(f"down.{stage}.sample", modules[0]),)))
            stage, layer = stage + 1, 0
    ends.append(len(inputs))
    outputs, stage, layer = [], 0, 0
    for block in unet.output_blocks:
        modules, name = list(block), f"up.{stage}.{layer}"
        resample = [m for m in modules[1:] if not hasattr(m, "transformer_blocks")]
        attention = [m for m in modules[1:] if hasattr(m, "transformer_blocks")]
        more = tuple(Part(f"up.{stage}.sample", module) for module in resample)
        outputs.append(Block(name, (*_pair(name, modules[0], attention[0] if attention else None), *more)))
        layer += 1
        if resample:
            stage, layer = stage + 1, 0
    middle = tuple(Part(f"mid.{i}", module) for i, module in enumerate(unet.middle_block or ()))
    return Places(tuple(inputs), Block("mid", middle), tuple(outputs), tuple(ends))


def _pair(name: str, resnet: nn.Module, attention: nn.Module | None) -> tuple[Part, ...]:
    parts = [Part(f"{name}.resnet", resnet, _shortcut(resnet))]
    if attention is not None:
        parts.append(Part(f"{name}.attention", attention, lambda x: x))
    return tuple(parts)


def _shortcut(resnet: Any) -> Callable[[Tensor], Tensor]:
    """What a ResBlock adds its residual to."""
    if hasattr(resnet, "skip_connection"):
        return lambda x: resnet.skip_connection(x)

    def shortcut(x: Tensor) -> Tensor:
        y: Tensor = x if resnet.conv_shortcut is None else resnet.conv_shortcut(x)
        return y / resnet.output_scale_factor

    return shortcut


def _units(block: Block) -> Iterator[Part]:
    for part in block.parts:
        if part.base is None:
            continue
        yield part
        for d, inner in enumerate(getattr(part.module, "transformer_blocks", ())):
            prefix = block.name if len(part.module.transformer_blocks) == 1 else f"{block.name}.{d}"  # type: ignore[arg-type]
            for word, attribute in (("self", "attn1"), ("cross", "attn2"), ("feedforward", "ff")):
                if getattr(inner, attribute, None) is not None:
                    # What these give is added to the residual stream by the block around them.
                    yield Part(f"{prefix}.{word}", getattr(inner, attribute), torch.zeros_like)
