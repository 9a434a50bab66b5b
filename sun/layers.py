"""One map of the cross-attention layers for every host.

A U-Net of the SD family is described by its stages: how many ResNet/attention pairs each has, how wide it is and how
many transformer blocks each attention has. Names and numbers of all hosts follow from that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

_TEXT_ATTENTION = re.compile(r"(?:^|\.)attentions\.\d+\.transformer_blocks\.\d+\.attn[12]$")


@dataclass(frozen=True)
class AttentionLayer:
    """One cross-attention layer (``attn2``) under the names each host gives it."""

    index: int
    """Position in diffusers' ``unet.attn_processors`` and key in the authors' files: 1, 3, ..., 31."""
    diffusers: str
    """Module name in a UNet2DConditionModel, "down_blocks.0.attentions.0.transformer_blocks.0.attn2"."""
    comfy: tuple[str, int, int]
    """ComfyUI's and Forge's patch key (block, block id, depth index), ("input", 1, 0)."""
    ldm: str
    """Module name in an LDM U-Net (ComfyUI, A1111), "input_blocks.1.1.transformer_blocks.0.attn2"."""
    channels: int
    """Width C of query, key and value."""
    transformer_index: int
    """Running count of spatial transformers in forward order (input, middle, output), as ComfyUI counts them."""
    name: str
    """Readable name in our files, "down_blocks.0.attentions.0"."""


@dataclass(frozen=True)
class Stage:
    """One resolution of the U-Net: its width and, for each ResNet, how many transformer blocks follow it (0: none)."""

    channels: int
    depths: tuple[int, ...]


def layers_from_structure(
    channels: Sequence[int],
    layers_per_block: int | Sequence[int] = 2,
    attention: Sequence[bool] | None = None,
    depth: int | Sequence[int] = 1,
    mid_depth: int | None = None,
) -> list[AttentionLayer]:
    """Return the cross-attention layers of a U-Net described by its configuration, in order of ``index``.

    channels: width of each stage, finest first (SD 1.5: 320, 640, 1280, 1280).
    layers_per_block: ResNets of a stage on the way down (the way up has one more).
    attention: which stages have cross-attention; by default all but the last one, as in SD 1.x.
    depth: transformer blocks in each attention, per stage (SD 1.x: 1). mid_depth: the same for the middle
    (default: the last stage's).

    Raises ValueError where the other settings do not name as many stages as ``channels``.
    """
    stages = len(channels)
    per_block = [layers_per_block] * stages if isinstance(layers_per_block, int) else list(layers_per_block)
    depths = [depth] * stages if isinstance(depth, int) else list(depth)
    attended = [True] * (stages - 1) + [False] if attention is None else list(attention)
    if not len(per_block) == len(depths) == len(attended) == stages:
        raise ValueError(f"channels names {stages} stages; layers_per_block, depth and attention must match it.")
    down = [Stage(c, (d if a else 0,) * n) for c, n, d, a in zip(channels, per_block, depths, attended, strict=True)]
    up = [Stage(stage.channels, (*stage.depths, stage.depths[0])) for stage in reversed(down)]
    return _enumerate(down, Stage(channels[-1], (depths[-1] if mid_depth is None else mid_depth,)), up)


def layers_of_unet(unet: Any) -> list[AttentionLayer]:
    """Return the cross-attention layers of a diffusers ``UNet2DConditionModel``, in order of ``index``.

    Of a ``UNetMotionModel`` they are those of the U-Net it was made of: attention over time has no text, and what is
    beside the text's attention is not counted. Raises ValueError if the U-Net's attention layers are not where the SD
    family has them.
    """

    def stage(block: Any) -> Stage:
        transformers = getattr(block, "attentions", None) or [None] * len(block.resnets)
        transformers = [getattr(t, "module", t) for t in transformers]  # FreeNoise's split inference wraps them
        blocks = [[] if t is None else list(getattr(t, "transformer_blocks", ())) for t in transformers]
        widths = [b.attn2.inner_dim for group in blocks for b in group if getattr(b, "attn2", None) is not None]
        return Stage(widths[0] if widths else 0, tuple(len(group) for group in blocks))

    mid = stage(unet.mid_block) if getattr(unet, "mid_block", None) is not None else Stage(0, ())
    layers = _enumerate([stage(b) for b in unet.down_blocks], mid, [stage(b) for b in unet.up_blocks])
    found = [(i, name) for i, name in enumerate(text_transformer_attentions(unet)) if name.endswith(".attn2")]
    if found != [(layer.index, layer.diffusers) for layer in layers]:
        raise ValueError(
            f"This {type(unet).__name__} does not have its cross-attention layers where Stable Diffusion 1.x has them "
            f"({len(found)} found, {len(layers)} expected). SUN supports U-Nets of the SD 1.x family."
        )
    return layers


def text_transformer_attentions(unet: Any) -> dict[str, nn.Module]:
    """The attention modules of a diffusers U-Net that belong to its transformers over text, by the names they have in a
    plain ``UNet2DConditionModel``, in the order of ``unet.attn_processors``."""
    found: dict[str, nn.Module] = {}
    for name in unet.attn_processors:
        own = name.removesuffix(".processor")
        plain = own.replace(".module.", ".")
        if _TEXT_ATTENTION.search(plain):
            found[plain] = unet.get_submodule(own)
    return found


def layers_of_ldm(unet: nn.Module | Mapping[str, Any]) -> list[AttentionLayer]:
    """Return the cross-attention layers of an LDM U-Net (ComfyUI, A1111, Forge), in order of ``index``.

    ``unet``: the module, or its state dict (tensors, or shapes by key). Key prefixes such as
    "model.diffusion_model." are ignored. Raises ValueError if no LDM U-Net is recognised.
    """
    names, widths = _ldm_names(unet)
    inputs = _block_depths(names, "input_blocks")
    outputs = _block_depths(names, "output_blocks")
    if not inputs or not outputs:
        raise ValueError("No Stable Diffusion U-Net in LDM layout here: input_blocks and output_blocks are missing.")
    downsamplers = {int(m[1]) for n in names if (m := re.match(r"input_blocks\.(\d+)\.0\.op\b", n))}

    def width(prefix: str, ids: Sequence[int]) -> int:
        return next((widths[w] for i in ids for w in widths if w.startswith(f"{prefix}.{i}.")), 0)

    down_ids: list[list[int]] = [[]]
    for i in range(1, max(inputs) + 1):
        if i in downsamplers:
            down_ids.append([])
        else:
            down_ids[-1].append(i)
    up_ids: list[list[int]] = []
    start = 0
    for ids in reversed(down_ids):
        up_ids.append(list(range(start, start + len(ids) + 1)))
        start += len(ids) + 1
    middle = len({m[1] for n in names if (m := re.match(r"middle_block\.1\.transformer_blocks\.(\d+)\.attn2", n))})
    mid_width = next((widths[w] for w in widths if w.startswith("middle_block.")), 0)
    layers = _enumerate(
        [Stage(width("input_blocks", ids), tuple(inputs.get(i, 0) for i in ids)) for ids in down_ids],
        Stage(mid_width, (middle,)),
        [Stage(width("output_blocks", ids), tuple(outputs.get(i, 0) for i in ids)) for ids in up_ids],
    )
    if {layer.ldm for layer in layers} != set(widths) or any(widths[la.ldm] != la.channels for la in layers):
        raise ValueError(
            f"This U-Net does not have its {len(widths)} cross-attention layers where Stable Diffusion 1.x has them. "
            "SUN supports U-Nets of the SD 1.x family."
        )
    return layers


def guess_layers(channels: Sequence[int]) -> list[AttentionLayer] | None:
    """Find the SD-like structure whose layers, in order of ``index``, have these widths; None if there is none.

    The authors' files say only how wide each layer is; names follow from the structure. Where several structures
    fit (equal widths everywhere), Stable Diffusion's two layers a stage win.
    """
    count = len(channels)
    for per_block in sorted(range(1, count), key=lambda n: (abs(n - 2), n)):
        stages, rest = divmod(count - 1, 2 * per_block + 1)
        if rest or stages == 0:
            continue
        widths = list(channels[: stages * per_block : per_block])
        layers = layers_from_structure([*widths, channels[-1]], per_block)
        if [layer.channels for layer in layers] == list(channels):
            return layers
    return None


def kept_positions(names: Sequence[str], unet: Any) -> list[int] | None:
    """Which of an original's layers, by their readable names, those of a compact U-Net assembled from it are.

    unet: the compact one, of diffusers or in LDM layout. Assembly leaves a stage its first layers on the way down; on
    the way up the first and the last ones, whose inputs have widths of their own. Returns positions in ``names`` in the
    order of the compact U-Net's layers, or None where it cannot have come from such an original. Raises ValueError for
    a U-Net of another family.
    """
    if hasattr(unet, "up_blocks"):
        layers, stages = layers_of_unet(unet), len(unet.up_blocks)
    else:
        layers = layers_of_ldm(unet)
        stages = 1 + sum(bool(re.search(r"input_blocks\.\d+\.0\.op$", name)) for name, _ in unet.named_modules())
    places = [_place(name) for name in names]
    if None in places:
        return None
    original = {place: i for i, place in enumerate(places) if place is not None}
    whole = max((block for way, block, _, _ in original if way == "up"), default=0) + 1
    found = []
    for place in (_place(layer.name) for layer in layers):
        assert place is not None
        way, block, number, rest = place
        old = block + whole - stages if way == "up" else block
        mine = sum(
            p is not None and p[:2] == (way, block) and p[3] == rest for p in map(_place, (la.name for la in layers))
        )
        theirs = sum(p[:2] == (way, old) and p[3] == rest for p in original)
        slot = number + theirs - mine if way == "up" and number else number
        position = original.get((way, old, slot, rest))
        if position is None or mine > theirs:
            return None
        found.append(position)
    return found


def _place(name: str) -> tuple[str, int, int, str] | None:
    """(down, up or mid; block; layer; transformer block) of a readable name."""
    match = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)(.*)", name)
    return (match[1] or "mid", int(match[2] or 0), int(match[3]), match[4]) if match else None


def _enumerate(down: Sequence[Stage], mid: Stage, up: Sequence[Stage]) -> list[AttentionLayer]:
    """Number the layers: diffusers lists down, up, mid; the forward pass runs down, mid, up."""
    layers: list[AttentionLayer] = []
    downward = sum(depth > 0 for stage in down for depth in stage.depths)
    has_mid = sum(depth > 0 for depth in mid.depths)

    def add(block: str, diffusers: str, ldm: str, block_id: int, transformer: int, channels: int, depth: int) -> None:
        for d in range(depth):
            tail = f"transformer_blocks.{d}"
            layers.append(
                AttentionLayer(
                    index=2 * len(layers) + 1,  # each transformer block lists its self-attention first
                    diffusers=f"{diffusers}.{tail}.attn2",
                    comfy=(block, block_id, d),
                    ldm=f"{ldm}.{tail}.attn2",
                    channels=channels,
                    transformer_index=transformer,
                    name=diffusers if depth == 1 else f"{diffusers}.{tail}",
                )
            )

    transformer = 0
    block_id = 1  # input_blocks.0 is the first convolution
    for s, stage in enumerate(down):
        for j, depth in enumerate(stage.depths):
            if depth:
                name = f"down_blocks.{s}.attentions.{j}"
                add("input", name, f"input_blocks.{block_id}.1", block_id, transformer, stage.channels, depth)
                transformer += 1
            block_id += 1
        block_id += 1  # the downsampler has a block of its own
    transformer += has_mid
    block_id = 0
    for s, stage in enumerate(up):
        for j, depth in enumerate(stage.depths):
            if depth:
                name = f"up_blocks.{s}.attentions.{j}"
                add("output", name, f"output_blocks.{block_id}.1", block_id, transformer, stage.channels, depth)
                transformer += 1
            block_id += 1
    for j, depth in enumerate(mid.depths):
        if depth:
            add("middle", f"mid_block.attentions.{j}", "middle_block.1", 0, downward, mid.channels, depth)
    return layers


def _ldm_names(unet: nn.Module | Mapping[str, Any]) -> tuple[set[str], dict[str, int]]:
    """Return all module and parameter names of an LDM U-Net without prefix, and the width of each attn2."""

    def clean(name: str) -> str:
        found = re.search(r"(?:^|\.)((?:input_blocks|middle_block|output_blocks)\..*)", name)
        return found[1] if found else ""

    widths: dict[str, int] = {}
    if isinstance(unet, nn.Module):
        names = {clean(name) for name, _ in unet.named_modules()}
        for name, module in unet.named_modules():
            if name.endswith(".attn2.to_q"):
                width = getattr(module, "out_features", None) or module.weight.shape[0]
                widths[clean(name).removesuffix(".to_q")] = int(width)
    else:
        names = {clean(name) for name in unet}
        for name, value in unet.items():
            if name.endswith(".attn2.to_q.weight"):
                widths[clean(name).removesuffix(".to_q.weight")] = int(getattr(value, "shape", value)[0])
    return names - {""}, widths


def _block_depths(names: set[str], group: str) -> dict[int, int]:
    """Return for each block id of a group how many attn2 layers it has."""
    ids = {int(m[1]): 0 for n in names if (m := re.match(rf"{group}\.(\d+)\.", n))}
    for block, _ in {
        (m[1], m[2]) for n in names if (m := re.match(rf"{group}\.(\d+)\.1\.transformer_blocks\.(\d+)\.attn2\b", n))
    }:
        ids[int(block)] += 1
    return ids
