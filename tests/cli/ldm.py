"""Write a diffusers pipeline as a single file in the original (LDM) names, as SD 1.x checkpoints are.

Written from the structure alone, independent of the converter under test.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_single_file(pipe: Any, path: Path) -> None:
    """All weights of ``pipe`` (with an AutoencoderKL) in one checkpoint."""
    tensors = {f"model.diffusion_model.{_unet(k)}": v for k, v in pipe.unet.state_dict().items()}
    for key, value in pipe.vae.state_dict().items():
        name = _vae(key)
        square = ".attn_1." in name and value.ndim == 2
        tensors[f"first_stage_model.{name}"] = value[..., None, None] if square else value
    for key, value in pipe.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)


def _unet(key: str) -> str:
    for ours, theirs in UNET_ENDS.items():
        if key.startswith(f"{ours}."):
            return theirs + key.removeprefix(ours)
    stage, part, index, rest = re.fullmatch(r"(\w+_blocks\.\d|mid_block)\.(\w+)\.(\d)\.(.*)", key).groups()  # type: ignore[union-attr]
    column = 0 if part == "resnets" else 1
    if part == "resnets":
        rest = re.sub(r"^\w+", lambda m: RESNET[m.group()], rest)
    if stage == "mid_block":
        return f"middle_block.{1 if part == 'attentions' else 2 * int(index)}.{rest}"
    number = int(stage[-1])
    if part == "downsamplers":
        return f"input_blocks.{3 * number + 3}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        return f"output_blocks.{3 * number + 2}.{1 if number == 0 else 2}.{rest}"
    if stage.startswith("down"):
        return f"input_blocks.{1 + 3 * number + int(index)}.{column}.{rest}"
    return f"output_blocks.{3 * number + int(index)}.{column}.{rest}"


def _vae(key: str) -> str:
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    match = re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.*)\.(weight|bias)", key)
    return f"{match[1]}mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}" if match else key


def make_vae() -> Any:
    """A tiny AutoencoderKL, the kind single files hold."""
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8), layers_per_block=2, norm_num_groups=2, sample_size=64,
    ).eval()  # fmt: skip
