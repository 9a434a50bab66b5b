"""A Stable Diffusion 1.x U-Net in LDM layout: module names as in checkpoints, CrossAttention as in the hosts.

With `transformer_options` its blocks follow Forge's contract: attn2_patch before the projections,
a replacement looked up as (block, id, depth) and then (block, id), both given the same dict. Without, A1111's: to_q,
to_k, to_v, attention, to_out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: Any = None) -> torch.Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = nn.Linear(context, width, bias=False), nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        context = x if context is None else context
        return self.to_out(attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class GEGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width), nn.Dropout(0.0), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(width, width, heads), CrossAttention(width, context, heads)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: torch.Tensor, context: torch.Tensor, options: dict[str, Any] | None) -> torch.Tensor:
        x = x + self.attn1(self.norm1(x))
        n = self.norm2(x)
        x = x + (self.attn2(n, context) if options is None else self._patched(n, context, options))
        return x + self.ff(self.norm3(x))

    def _patched(self, n: torch.Tensor, context: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        extra = {key: value for key, value in options.items() if key not in ("patches", "patches_replace")}
        extra |= {"n_heads": self.attn2.heads, "dim_head": n.shape[-1] // self.attn2.heads}
        value = context
        for patch in options.get("patches", {}).get("attn2_patch", []):
            n, context, value = patch(n, context, value, extra)
        replace = options.get("patches_replace", {}).get("attn2", {})
        block = options["block"]
        patch = replace.get((*block, options.get("block_index", 0)), replace.get(block))
        q, k, v = self.attn2.to_q(n), self.attn2.to_k(context), self.attn2.to_v(value)
        z = attention(q, k, v, self.attn2.heads) if patch is None else patch(q, k, v, extra)
        return self.attn2.to_out(z)


class SpatialTransformer(nn.Module):
    def __init__(self, width: int, context: int, heads: int, groups: int, depth: int = 1) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context, heads) for _ in range(depth)])

    def forward(self, x: torch.Tensor, context: torch.Tensor, options: dict[str, Any] | None) -> torch.Tensor:
        h = self.proj_in(self.norm(x))
        tokens = h.flatten(2).transpose(1, 2)
        for i, block in enumerate(self.transformer_blocks):
            tokens = block(tokens, context, None if options is None else {**options, "block_index": i})
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, h.shape[2:]))


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outputs))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, outputs), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.in_layers(x) + self.emb_layers(embedding)[..., None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """stages: widths, finest first; all but the last have cross-attention. blocks: residual blocks of each stage, two
    by default, as LDM's `num_res_blocks` takes a number or a list; on the way up a stage has one more. depths: blocks
    of each stage's transformers, 0 for none, and middle of that of the middle, as SDXL has them. vector: width of
    SDXL's sizes and pooled text."""

    def __init__(
        self, stages: tuple[int, ...], context: int, heads: int, groups: int = 32, channels: int = 4,
        blocks: tuple[int, ...] | None = None, depths: tuple[int, ...] | None = None, middle: int = 1, vector: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        blocks = blocks or (2,) * len(stages)
        depths = depths or (1,) * (len(stages) - 1) + (0,)
        base, embedding, last = stages[0], 4 * stages[0], len(stages) - 1

        def res(inputs: int, outputs: int) -> ResBlock:
            return ResBlock(inputs, outputs, embedding, groups)

        def att(width: int, depth: int) -> list[nn.Module]:
            return [SpatialTransformer(width, context, heads, groups, depth)] if depth else []

        self.base = base
        self.vector = vector
        if vector:
            self.label_emb = nn.Sequential(
                nn.Sequential(nn.Linear(vector, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
            )
        self.time_embed = nn.Sequential(nn.Linear(base, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(channels, base, 3, padding=1)])])
        widths, width = [base], base
        for number, stage in enumerate(stages):
            for _ in range(blocks[number]):
                self.input_blocks.append(nn.ModuleList([res(width, stage), *att(stage, depths[number])]))
                width = stage
                widths.append(width)
            if number < last:
                self.input_blocks.append(nn.ModuleList([Downsample(width)]))
                widths.append(width)
        inner = [*att(width, middle), res(width, width)] if middle else []  # SSD-1B has one layer there
        self.middle_block = nn.ModuleList([res(width, width), *inner])
        self.output_blocks = nn.ModuleList()
        for number, stage in reversed(list(enumerate(stages))):
            for i in range(blocks[number] + 1):
                parts = [res(width + widths.pop(), stage), *att(stage, depths[number])]
                width = stage
                if i == blocks[number] and number:
                    parts.append(Upsample(width))
                self.output_blocks.append(nn.ModuleList(parts))
        self.out = nn.Sequential(nn.GroupNorm(groups, base), nn.SiLU(), nn.Conv2d(base, 4, 3, padding=1))

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, control: Any = None,
        transformer_options: dict[str, Any] | None = None, y: torch.Tensor | None = None, **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        half = self.base // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = timesteps.float()[:, None] * frequencies[None]
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype))
        if self.vector:
            embedding = embedding + self.label_emb(y)

        def run(parts: Any, h: torch.Tensor, block: tuple[str, int]) -> torch.Tensor:
            options = None if transformer_options is None else {**transformer_options, "block": block}
            for part in parts:
                if isinstance(part, ResBlock):
                    h = part(h, embedding)
                elif isinstance(part, SpatialTransformer):
                    h = part(h, context, options)
                else:
                    h = part(h)
            return h

        def controlled(h: torch.Tensor, name: str) -> torch.Tensor:
            """Forge's way: the last of the list, added in place (it prints a warning where this one fails)."""
            residual = control[name].pop() if control and control.get(name) else None
            return h if residual is None else h.add_(residual)

        skips, h = [], x
        for i, parts in enumerate(self.input_blocks):
            h = controlled(run(parts, h, ("input", i)), "input")
            skips.append(h)
        h = controlled(run(self.middle_block, h, ("middle", 0)), "middle")
        for i, parts in enumerate(self.output_blocks):
            h = run(parts, torch.cat([h, controlled(skips.pop(), "output")], 1), ("output", i))
        return self.out(h)
