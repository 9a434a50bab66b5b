"""A compact U-Net put together from the original: an ordinary ``UNet2DConditionModel`` with the original's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .planfile import Plan
from .structure import CompactError, Kept, new_config, new_name, old_name, shape_of


def assemble(unet: Any, plan: Plan, share: bool = False) -> Any:
    """A new ``UNet2DConditionModel`` without what ``plan`` removes, in evaluation mode, on the original's device.

    Layers that stay have the original's weights, so the result is valid before any training. share: take the
    original's tensors instead of copies, for a look only: training one would change both. The original is not touched.
    Raises CompactError for a plan for another U-Net.
    """
    unet = getattr(unet, "_orig_mod", unet)
    if not hasattr(unet, "config") or not hasattr(unet, "down_blocks"):
        raise CompactError(f"A {type(unet).__name__} is no U-Net of diffusers; assemble one of those.")
    if not isinstance(plan, Plan):
        raise CompactError(
            f"A {type(plan).__name__} is no plan. Make one with sun.compact.plan(unet), or read one with "
            "sun.compact.read_plan(file)."
        )
    check_plain(unet)
    plan.check(shape_of(unet.config))
    stays = plan.kept
    config = new_config(dict(unet.config), stays)
    for name in ("_name_or_path", "_use_default_values"):  # of the original: its path, and what diffusers would reset
        config.pop(name, None)
    kind = type(unet)
    with torch.device("meta"):
        small = kind.from_config(config)
    tensors = weights_for(unet.state_dict(), small.state_dict(), stays)
    if not share:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    small.load_state_dict(tensors, assign=True)
    return small.eval()


def check_plain(unet: Any) -> None:
    """Raise CompactError for a U-Net without weights, and for adapters on it, which would have nowhere to go."""
    names = [name for name, _ in unet.named_parameters()]
    offloaded = any(hasattr(module, "_hf_hook") for module in unet.modules())  # else only shapes are looked at
    if offloaded and any(parameter.is_meta for parameter in unet.parameters()):
        raise CompactError(
            "This U-Net's weights are not in memory (it is offloaded layer by layer). Assemble it before "
            "enable_sequential_cpu_offload, or load it again."
        )
    if any(".lora_" in name or ".base_layer." in name for name in names):
        raise CompactError(
            "This U-Net carries a LoRA. Fuse it (pipe.fuse_lora(), then unload_lora_weights()) or take it off, then "
            "assemble; a LoRA of the original can be put on the compact U-Net again."
        )
    if any(".processor." in name for name in names):
        raise CompactError(
            "This U-Net carries an adapter in its attention (IP-Adapter). Take it off, assemble, and put it on the "
            "compact U-Net."
        )


def weights_for(original: Mapping[str, Tensor], wanted: Mapping[str, Tensor], stays: Kept) -> dict[str, Tensor]:
    """The original's tensors under the names of what stays; ``wanted`` has the new U-Net's names and shapes.

    Raises CompactError where the original lacks one or it has another shape.
    """
    found = {}
    for name, target in wanted.items():
        tensor = original.get(old_name(name, stays))
        if tensor is None:
            raise CompactError(f"The original has no {old_name(name, stays)}, which {name} would take over.")
        found[name] = tensor if tensor.shape == target.shape else _widened(name, tensor, target.shape, stays)
    return found


def weights_by_plan(original: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The weights of the assembled U-Net, all of them by diffusers' names, without building either.

    Raises CompactError for a plan that contradicts itself or weights of another shape than it says.
    """
    stays = plan.kept
    named = ((new_name(old, stays), tensor) for old, tensor in original.items())
    return {name: _as_wide_as_needed(name, tensor, stays) for name, tensor in named if name is not None}


_PARTS = ("norm1.weight", "norm1.bias", "conv1.weight", "conv_shortcut.weight")
_INPUTS = tuple(f"up_blocks.0.resnets.0.{part}" for part in _PARTS)


def _as_wide_as_needed(name: str, tensor: Tensor, stays: Kept) -> Tensor:
    if name not in _INPUTS or len(stays.down) == stays.shape.stages:
        return tensor
    shape, axis = list(tensor.shape), 1 if tensor.dim() > 1 else 0
    shape[axis] = stays.result.widths[-1] + stays.shape.widths[len(stays.down) - 1]
    return tensor if shape == list(tensor.shape) else _widened(name, tensor, torch.Size(shape), stays)


def _widened(name: str, tensor: Tensor, shape: torch.Size, stays: Kept) -> Tensor:
    """A tensor of the first layer on the way up, after the innermost stage is gone whose mirror had another width.

    Its input is what comes from below, then the skip connection. The skip's part is taken over; what is new starts at
    zero, so that the layer first sees the skip connection alone, as norms' scales at one.
    """
    below, skip = stays.result.widths[-1], stays.shape.widths[len(stays.down) - 1]
    first = name.startswith("up_blocks.0.resnets.0.") and len(stays.down) < stays.shape.stages
    axis = 1 if tensor.dim() > 1 else 0
    if not first or shape[axis] != below + skip or tensor.shape[axis] < skip:
        raise CompactError(f"{name} is {list(tensor.shape)} in the original and {list(shape)} in the compact U-Net.")
    new = torch.full(tuple(shape), float(name.endswith("norm1.weight")), dtype=tensor.dtype, device=tensor.device)
    new.narrow(axis, below, skip).copy_(tensor.narrow(axis, tensor.shape[axis] - skip, skip))
    return new
