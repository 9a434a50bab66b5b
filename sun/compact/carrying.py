"""What was made for the original, brought to a compact U-Net: LoRAs by name, a ControlNet's residuals by place.

On the way up assembly moves layers to other numbers, so a LoRA put on by name alone would sit on the wrong layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from .planfile import Plan
from .structure import CompactError

_PLACE = re.compile(r"(down|up)([_.]blocks[._])(\d+)([._])(resnets|attentions)([._])(\d+)(?=[._])")


def carry_over(tensors: Mapping[str, Tensor], plan: Plan) -> tuple[dict[str, Tensor], list[str]]:
    """A LoRA's tensors under the names they have on the compact U-Net, and the names of those whose layer is gone.

    Takes diffusers' names with any prefix and kohya's (``lora_unet_up_blocks_3_attentions_2_...``); text encoders'
    tensors stay as they are. Raises CompactError for a file in which no name of a U-Net layer is known.
    """
    kept, gone, known = {}, [], 0
    for name, tensor in tensors.items():
        new = _new_name(name, plan)
        known += bool(_PLACE.search(name)) or "mid_block" in name
        if new is None:
            gone.append(name)
        else:
            kept[new] = tensor
    if not known:
        raise CompactError(
            "No name in this LoRA is one of a U-Net's layers as diffusers or kohya call them. Convert it to one of "
            "these layouts first."
        )
    return kept, gone


def _new_name(name: str, plan: Plan) -> str | None:
    stays = plan.kept
    stages, dropped = len(stays.down), stays.shape.stages - len(stays.down)
    if "mid_block" in name:
        return name if stays.mid >= 0 else None
    match = _PLACE.search(name)
    if match is None:
        return name
    way, block, number = match[1], int(match[3]), int(match[7])
    stage = block if way == "down" else stays.shape.stages - 1 - block
    if stage >= stages or (match[5] == "attentions" and not stays.depths[stage]):
        return None
    numbers = (stays.down if way == "down" else stays.up)[stage]
    if number not in numbers:
        return None
    new = block if way == "down" else block - dropped
    place = f"{way}{match[2]}{new}{match[4]}{match[5]}{match[6]}{numbers.index(number)}"
    if (deep := re.search(r"transformer_blocks[._](\d+)", name)) and int(deep[1]) >= stays.depths[stage]:
        return None
    return name[: match.start()] + place + name[match.end() :]


def control_residuals(residuals: Sequence[Tensor], plan: Plan) -> list[Tensor]:
    """Of the original's ControlNet residuals [B, C, h, w], one for each skip connection, those the compact U-Net has.

    Raises CompactError for another number of them.
    """
    shape, stays = plan.shape, plan.kept
    last = shape.stages - 1
    places: list[tuple[int, int]] = [(-1, 0)]  # the first convolution
    for s, count in enumerate(shape.layers):
        places += [(s, j) for j in range(count)] + [(s, -1)] * (s < last)
    if len(residuals) != len(places):
        raise CompactError(
            f"This ControlNet gives {len(residuals)} residuals, and one for the original this plan is for gives "
            f"{len(places)} residuals. Use a ControlNet of the original."
        )
    end = len(stays.down) - 1

    def stays_here(s: int, j: int) -> bool:
        return s < 0 or (s <= end and (j in stays.down[s] if j >= 0 else s < end))

    return [r for r, (s, j) in zip(residuals, places, strict=True) if stays_here(s, j)]
