"""What was made for the original, brought to a compact U-Net: LoRAs by name, a ControlNet's residuals by place.

On the way up assembly moves layers to other numbers, so a LoRA put on by name alone would sit on the wrong layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .planfile import Plan
from .structure import LAYER, CompactError, new_name


def carry_over(tensors: Mapping[str, Tensor], plan: Plan) -> tuple[dict[str, Tensor], list[str]]:
    """A LoRA's tensors under the names they have on the compact U-Net, and the names of those whose layer is gone.

    Takes diffusers' names with any prefix and kohya's (``lora_unet_up_blocks_3_attentions_2_...``); text encoders'
    tensors stay as they are. Raises CompactError for a file in which no name of a U-Net layer is known.
    """
    stays = plan.kept
    kept, gone, known = {}, [], 0
    for name, tensor in tensors.items():
        new = new_name(name, stays)
        known += bool(LAYER.search(name)) or "mid_block" in name
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
