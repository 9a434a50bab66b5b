"""A compact U-Net in LDM layout: the names of single-file checkpoints, and the config file A1111 reads beside one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .structure import CompactError, Shape, shape_of

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_SINGLE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_name(name: str, shape: Shape) -> str:
    """LDM's name of a tensor of a diffusers U-Net of ``shape``. Raises CompactError for one LDM has no place for."""
    if match := re.fullmatch(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
    ):
        return _in_stage(shape, match[1], int(match[2]), match[3], int(match[4]), match[5])
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        if match[1] == "attentions":
            return f"middle_block.1.{match[3]}"
        return f"middle_block.{2 * int(match[2])}.{_resnet(match[3])}"
    layer, _, rest = name.rpartition(".")
    if layer not in _SINGLE:
        raise CompactError(f"The LDM layout has no place for {name}; it is written for SD 1.x, 2.x and SDXL U-Nets.")
    return f"{_SINGLE[layer]}.{rest}"


def _in_stage(shape: Shape, way: str, block: int, kind: str, number: int, rest: str) -> str:
    if way == "down":
        stage, prefix = block, "input_blocks"
        # after the first convolution, a stage has its layers and a block that halves the picture
        first = 1 + sum(n + 1 for n in shape.layers[:stage])
        last = first + shape.layers[stage]
    else:
        stage, prefix = shape.stages - 1 - block, "output_blocks"
        first = sum(n + 1 for n in shape.layers[stage + 1 :])
        last = first + shape.layers[stage]
    if kind == "downsamplers":
        return f"{prefix}.{last}.0.{rest.replace('conv.', 'op.', 1)}"
    if kind == "upsamplers":
        return f"{prefix}.{last}.{2 if shape.depths[stage] else 1}.{rest}"
    return f"{prefix}.{first + number}." + (f"0.{_resnet(rest)}" if kind == "resnets" else f"1.{rest}")


def _resnet(rest: str) -> str:
    part, _, tensor = rest.partition(".")
    return f"{_RESNET[part]}.{tensor}"


def unet_tensors(tensors: Mapping[str, Tensor], config: Mapping[str, Any], prefix: str = UNET) -> dict[str, Tensor]:
    """A diffusers U-Net's tensors under LDM's names, with the prefix they have in a checkpoint. Raises CompactError."""
    shape = shape_of(config)
    return {prefix + ldm_name(name, shape): tensor for name, tensor in tensors.items()}


def vae_tensors(tensors: Mapping[str, Tensor], stages: int = 4) -> dict[str, Tensor]:
    """A diffusers ``AutoencoderKL``'s tensors under LDM's names. ``stages`` of its decoder and encoder."""
    found = {}
    for name, tensor in tensors.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{stages - 1 - int(m[1])}.block.", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{stages - 1 - int(m[1])}.upsample.", new)
        new = re.sub(r"mid_block\.resnets\.(\d+)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", new)
        if "mid_block.attentions.0." in new:
            new = new.replace("mid_block.attentions.0.", "mid.attn_1.")
            for theirs, mine in _ATTENTION.items():
                new = new.replace(f"mid.attn_1.{theirs}.", f"mid.attn_1.{mine}.")
            if tensor.dim() == 2:  # LDM has 1 x 1 convolutions there
                tensor = tensor[:, :, None, None]
        found[VAE + new] = tensor
    return found


_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def text_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The CLIP text encoder's tensors of SD 1.x under a checkpoint's names."""
    return {f"{TEXT}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}


def why_no_config(config: Mapping[str, Any]) -> str:
    """A sentence if A1111 cannot be told of this U-Net by a config file, else empty. Forge and ComfyUI need none."""
    shape = shape_of(config)
    if shape.mid_depth < 0:
        return (
            "A1111 builds every U-Net with a middle, and this one has none: its weights would stay random there. Load "
            "it in Forge, ComfyUI or diffusers, or assemble without removing the middle (shallow, bk-base)."
        )
    if shape.added or len(shape.widths) == 3:
        return "A1111's configs of SDXL are not written here: load the file in Forge, ComfyUI or diffusers."
    return ""


# Transformer blocks of each layer on the way down, by which ComfyUI and Forge know SDXL and what was made from it.
_KNOWN_XL = {
    (0, 0, 2, 2, 10, 10): "SDXL",
    (0, 0, 2, 2, 4, 4): "SSD-1B",
    (0, 0, 1, 1, 2, 2): "Segmind Vega",
    (0, 2, 5): "KOALA-700M",
    (0, 2, 6): "KOALA-1B",
}


def why_not_comfyui(config: Mapping[str, Any]) -> str:
    """A sentence if ComfyUI's own loaders (and Forge's) will not know a single file of this U-Net, else empty."""
    shape = shape_of(config)
    depths = tuple(d for d, n in zip(shape.depths, shape.layers, strict=True) for _ in range(n))
    if not shape.added or depths in _KNOWN_XL:
        return ""
    known = "; ".join(f"{list(d)} ({name})" for d, name in _KNOWN_XL.items())
    return (
        f"ComfyUI and Forge know U-Nets of the SDXL kind by their transformers, and {list(depths)} is none they know: "
        f"{known}. Load this one in diffusers, or remove so that one of these is left, as depth.2.4 does."
    )


def a1111_config(config: Mapping[str, Any], prediction: str = "epsilon") -> str:
    """The ``.yaml`` A1111 reads beside a checkpoint of this U-Net (SD 1.x and 2.x). Raises CompactError."""
    if reason := why_no_config(config):
        raise CompactError(reason)
    shape = shape_of(config)
    base = shape.widths[0]
    if any(width % base for width in shape.widths):
        raise CompactError(f"LDM states widths as multiples of the first; {list(shape.widths)} are none.")
    heads = config.get("num_attention_heads") or config["attention_head_dim"]
    if isinstance(heads, (list, tuple)):
        head_setting = f"num_head_channels: {base // heads[0]}"
    else:
        head_setting = f"num_heads: {heads}"
    resolutions = [2**s for s in reversed(range(shape.stages)) if shape.depths[s]]
    text = "FrozenOpenCLIPEmbedder" if shape.text_width == 1024 else "FrozenCLIPEmbedder"
    return _YAML.format(
        parameterization='    parameterization: "v"\n' if prediction == "v_prediction" else "",
        channels=shape.channels[0],
        out=shape.channels[1],
        base=base,
        resolutions=resolutions,
        layers=list(shape.layers),
        multiples=[width // base for width in shape.widths],
        heads=head_setting,
        linear="        use_linear_in_transformer: True\n" if shape.linear else "",
        context=shape.text_width,
        text=text,
        text_params="\n      params:\n        freeze: True\n        layer: penultimate"
        if shape.text_width == 1024
        else "",
    )


_YAML = """\
model:
  base_learning_rate: 1.0e-04
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
{parameterization}    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: jpg
    cond_stage_key: txt
    image_size: 64
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: False
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 32
        in_channels: {channels}
        out_channels: {out}
        model_channels: {base}
        attention_resolutions: {resolutions}
        num_res_blocks: {layers}
        channel_mult: {multiples}
        {heads}
        use_spatial_transformer: True
{linear}        transformer_depth: 1
        context_dim: {context}
        use_checkpoint: False
        legacy: False
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: 128
          ch_mult: [1, 2, 4, 4]
          num_res_blocks: 2
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.{text}{text_params}
"""
