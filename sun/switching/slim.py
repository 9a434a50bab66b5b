"""A small U-Net in LDM layout, built of a host's own large one: for hosts that load whole checkpoints alone.

Whatever the host's classes, number formats and attention kernels are, the small U-Net has them too, because its layers
are those of the large one with other weights. That needs a U-Net which is the large one with layers left out, as
assembled ones, BK-SDM and SSD-1B are.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .pair import ldm_stages
from .plan import SwitchingError

PREFIX = "model.diffusion_model."
_INPUT = re.compile(r"(input_blocks|output_blocks)\.(\d{1,4})\.(\d{1,4})\.")
_MIDDLE = re.compile(r"middle_block\.(\d{1,4})\.")


Block = tuple[str, int]
"""As hosts name a block: ("input", 4)."""


@dataclass
class Slim:
    """A small U-Net. ``origins``: the large one's block that each of its blocks is like."""

    unet: Any
    origins: dict[Block, Block] = field(default_factory=dict)

    def attentions(self) -> dict[str, str]:
        """The large U-Net's name of each module of cross-attention of the small one, by its name there."""
        found = {}
        for (kind, i), (_, origin) in self.origins.items():
            own, theirs = (f"{kind}_blocks.{n}" for n in (i, origin))
            if kind == "middle":
                own = theirs = "middle_block"
            for path, _ in self.unet.get_submodule(own).named_modules():
                if path.endswith(".attn2"):
                    found[f"{own}.{path}"] = f"{theirs}.{path}"
        return found

    def replaced(self, patches: Mapping[Any, Any]) -> dict[Any, Any]:
        """Patches by block, (kind, id) or (kind, id, depth), of the large U-Net under the small one's names."""
        return {
            (*own, *key[2:]): patch
            for own, origin in self.origins.items()
            for key, patch in patches.items()
            if tuple(key[:2]) == origin
        }


def slim(large: Any, weights: Mapping[str, Tensor], forget: tuple[str, ...] = ()) -> Slim:
    """The U-Net of ``weights`` (LDM names, without prefix) as a copy of the needed layers of ``large``.

    Weights take the number format and the device of the layers they are for. Nothing of ``large`` changes, and of its
    weights nothing is copied. forget: attributes of modules in which a host keeps what belongs to the weights there.
    Raises SwitchingError where the weights are no slimmer version of ``large``.
    """
    if not hasattr(large, "input_blocks") or not hasattr(large, "output_blocks"):
        raise SwitchingError(
            f"Switching needs a U-Net of Stable Diffusion 1.x, 2.x or SDXL, and the loaded model's is a "
            f"{type(large).__name__}."
        )
    layout = {kind: _blocks(weights, kind) for kind in ("input_blocks", "output_blocks")}
    downs = [f"input_blocks.{i}.0.op.weight" in weights for i in range(len(layout["input_blocks"]))]
    chosen_in = _of_input(large, downs)
    chosen_out = _of_output(large, layout["output_blocks"], chosen_in)
    middle = sorted({int(match[1]) for name in weights if (match := _MIDDLE.match(name))})
    made = _without_weights(large, forget)
    origins: dict[Block, Block] = {("middle", 0): ("middle", 0)}
    for kind, chosen in (("input_blocks", chosen_in), ("output_blocks", chosen_out)):
        blocks, small = getattr(made, kind), []
        for i, (origin, parts) in enumerate(zip(chosen, layout[kind], strict=True)):
            block = copy.copy(blocks[origin])  # a block may serve as the pattern of two
            small.append(_kept(copy.deepcopy(block), parts, weights, f"{kind}.{i}"))
            name = kind.removesuffix("_blocks")
            origins[name, i] = (name, origin)
        setattr(made, kind, type(blocks)(small))
    made.middle_block = _kept(made.middle_block, middle, weights, "middle_block")
    _fill(made, large, weights)
    return Slim(made, origins)


def unet_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net's part of a checkpoint by LDM's names, without prefix; of a file that is a U-Net alone, all of it."""
    own = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    return own or {name: tensor for name, tensor in tensors.items() if is_unet_name(name)}


def is_unet_name(name: str) -> bool:
    """Whether a tensor of this name belongs to a U-Net in LDM layout, with or without a checkpoint's prefix."""
    return name.removeprefix(PREFIX).startswith(
        ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
    )


def _blocks(weights: Mapping[str, Tensor], kind: str) -> list[list[int]]:
    """The positions within each block that have weights."""
    found: dict[int, set[int]] = {}
    for name in weights:
        match = _INPUT.match(name)
        if match and match[1] == kind:
            found.setdefault(int(match[2]), set()).add(int(match[3]))
    if sorted(found) != list(range(len(found))) or not found:
        raise SwitchingError(
            "This file holds no complete U-Net in the layout of Stable Diffusion checkpoints. Take a checkpoint, or "
            "the single file that sun assemble writes."
        )
    return [sorted(found[i]) for i in range(len(found))]


def _of_input(large: Any, downs: list[bool]) -> list[int]:
    """Which block of the large U-Net each of the small one's input blocks is like. downs: which are downsamplers."""
    theirs = ldm_stages(large.input_blocks)
    chosen, stage, layer = [0], 0, 0
    for down in downs[1:]:
        if down and stage < len(theirs) - 1:
            chosen.append(theirs[stage][-1] + 1)
            stage, layer = stage + 1, 0
        elif not down and layer < len(theirs[stage]):
            chosen.append(theirs[stage][layer])
            layer += 1
        else:
            raise _not_slimmer()
    return chosen


def _of_output(large: Any, layout: list[list[int]], chosen_in: list[int]) -> list[int]:
    """The same for output blocks: a stage's first and last slots are those of the large one, its widths demand it."""
    theirs = ldm_stages(large.input_blocks)
    counts = [sum(i in chosen_in for i in stage) for stage in theirs]
    kept = [stage for stage, count in enumerate(counts) if count]
    begin = {}
    position = 0
    for stage in reversed(range(len(theirs))):
        begin[stage] = position
        position += len(theirs[stage]) + 1
    chosen = []
    for stage in reversed(kept):
        slots = [begin[stage] + j for j in range(counts[stage])]
        chosen += [*slots, begin[stage] + len(theirs[stage])]
    if len(chosen) != len(layout):
        raise _not_slimmer()
    return chosen


def _without_weights(module: Any, forget: tuple[str, ...]) -> Any:
    """A copy of a module in which every weight is a shape alone, without the attributes ``forget``."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    for one in module.modules():  # hooks are of the host's runs, and hold what must not be copied
        for hooks in (one._forward_hooks, one._forward_pre_hooks):
            memo[id(hooks)] = type(hooks)()
        memo |= {id(vars(one)[name]): None for name in forget if vars(one).get(name) is not None}
    made = copy.deepcopy(module, memo)
    for one in made.modules():
        for name in forget:
            vars(one).pop(name, None)
    return made


def _kept(block: Any, parts: list[int], weights: Mapping[str, Tensor], name: str) -> Any:
    """A block with the parts there are weights for, and of transformers as many blocks as there are weights for.

    A part that is gone moves those behind it up, so each is known by what it holds.
    """
    there = {kind: [m for m in block if _kind(dict(m.named_parameters())) == kind] for kind in _KINDS.values()}
    small = []
    for i in parts:
        prefix = f"{name}.{i}."
        kind = _kind({key.removeprefix(prefix) for key in weights if key.startswith(prefix)})
        if not there.get(kind):
            raise _not_slimmer()
        small.append(there[kind].pop(0))
    for i, module in enumerate(small):
        depth = getattr(module, "transformer_blocks", None)
        if depth is not None:
            pattern = re.compile(re.escape(f"{name}.{parts[i]}.transformer_blocks.") + r"(\d+)\.")
            count = len({match[1] for key in weights if (match := pattern.match(key))})
            module.transformer_blocks = type(depth)(list(depth)[:count])
    return type(block)(*small) if isinstance(block, nn.Sequential) else type(block)(small)


_SEAM = ("output_blocks.0.0.in_layers.", "output_blocks.0.0.skip_connection.")
_KINDS = {"in_layers.": "layer", "transformer_blocks.": "transformer", "op.": "down", "conv.": "up", "": "convolution"}


def _kind(names: Iterable[str]) -> str:
    """What a part of a block is, by the names of its weights."""
    names = set(names)
    return next(kind for begin, kind in _KINDS.items() if any(name.startswith(begin) for name in names) or not begin)


def _fill(made: Any, large: Any, weights: Mapping[str, Tensor]) -> None:
    """Put the weights in. Raises SwitchingError for any that is missing, left over, or of another shape."""
    like = next(large.parameters())
    wanted = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    fewer_stages = len(made.output_blocks) < len(large.output_blocks) and len(ldm_stages(made.input_blocks)) < len(
        ldm_stages(large.input_blocks)
    )

    def fits(name: str) -> bool:
        ours, theirs = weights[name].shape, wanted[name].shape
        # Where the innermost stage is gone the first layer on the way up gets another stage's width.
        seam = fewer_stages and name.startswith(_SEAM) and len(ours) == len(theirs)
        return ours == theirs or (seam and (len(ours) == 1 or ours[0] == theirs[0]))

    wrong = [name for name in wanted if name not in weights or not fits(name)]
    wrong += [name for name in weights if name not in wanted]
    if wrong:
        raise _not_slimmer(wrong)
    for name, shape in wanted.items():
        *path, last = name.split(".")
        owner = made.get_submodule(".".join(path))
        tensor = weights[name].to(device=like.device, dtype=shape.dtype, copy=True)  # not the file's own memory
        if isinstance(shape, nn.Parameter):
            setattr(owner, last, nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(last, tensor)


def _not_slimmer(wrong: list[str] | None = None) -> SwitchingError:
    which = f" ({len(wrong)} tensors do not fit, {wrong[0]} among them)" if wrong else ""
    return SwitchingError(
        f"The small U-Net is not the loaded model's with layers left out{which}. Take one that was assembled from a "
        "model of this family: BK-SDM or an assembled one for Stable Diffusion 1.x, SSD-1B for SDXL."
    )
