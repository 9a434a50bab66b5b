"""Loads a small Stable Diffusion in diffusers' folder layout (Emoji Diffusion) as ComfyUI's MODEL, CLIP and VAE.

ComfyUI's own loaders know only the published widths (320 channels, CLIP-L), so the parts are put together here from its
classes: a UNetModel, an SD1 CLIP with another size and vocabulary, and TAESD. Nothing is written to disk.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.controlnet
import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer

from ..sun.compact import CompactError, read_plan
from ..sun.compact.assembly import weights_by_plan
from ..sun.compact.ldm import unet_tensors
from ..sun.shipped.edges import find_edges as edges_of
from ..sun.shipped.lowrank import merge

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


class EmojiDiffusionError(ValueError):
    """The folder is incomplete or holds a model these classes cannot express; the message says which part and why."""


def load(
    folder: Path, changes: Path | None = None, compact: Path | None = None
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of a diffusers folder. Raises EmojiDiffusionError.

    `changes` is a file that makes a 9-channel inpainting model of the folder's U-Net, `compact` the folder of a compact
    U-Net that takes its place, with weights of its own or with the plan by which it is made of the folder's.
    """
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise EmojiDiffusionError(
            f"Emoji Diffusion is incomplete: {folder} has no {', '.join(missing)}. Install the SUN node pack again."
        )
    _check_trained(changes, "inpainting model", "train-emoji inpainting")
    _check_trained(compact and compact / "config.json", "compact U-Net", "train-compact")
    vae = load_vae(folder / "vae")
    model = load_unet(folder, preview_format(vae), changes, compact)
    if changes is not None:
        model.model.blank_inpaint_image_like = grey_like(vae, model.model.latent_format)
    return model, load_clip(folder), vae


def load_controlnet(file: Path, find_edges: bool) -> comfy.controlnet.ControlLora:
    """CONTROL_NET of a Control-LoRA, whose pictures are turned into edges if `find_edges`.

    Raises EmojiDiffusionError.
    """
    _check_trained(file, "ControlNet", "train-emoji controlnet")
    control_net = comfy.controlnet.load_controlnet(str(file))
    if not isinstance(control_net, comfy.controlnet.ControlLora):
        raise EmojiDiffusionError(f"{file} is not a Control-LoRA. Install the SUN node pack again.")
    if find_edges:
        control_net.preprocess_image = edge_hint
    return control_net


def edge_hint(pixels: torch.Tensor) -> torch.Tensor:
    """Control pictures [B, 3, H, W] of pictures [B, 3, H, W], both in 0..1."""
    return edges_of(pixels[:, :3]).expand(-1, 3, -1, -1)


@torch.no_grad()
def grey_like(
    vae: comfy.sd.VAE, latent_format: comfy.latent_formats.LatentFormat
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What ComfyUI gives an inpainting model as masked picture when there is none: grey, in this model's latents."""
    grey = latent_format.process_in(vae.encode(torch.full((1, 128, 128, 3), 0.5)))
    latent = grey[:, :, 4:12, 4:12].mean((2, 3), keepdim=True)  # latents near the edge know that it is one

    def blank(like: torch.Tensor) -> torch.Tensor:
        return latent.to(like).expand_as(like).clone()

    return blank


def _check_trained(file: Path | None, what: str, command: str) -> None:
    if file is not None and not file.is_file():
        raise EmojiDiffusionError(
            f"The {what} of Emoji Diffusion is not in this installation: {file} is missing. Update the SUN node pack, "
            f"or train it in a clone of the repository: sun {command}."
        )


def fingerprint(folder: Path) -> str:
    """Changes when a file of the folder does."""
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return ";".join(f"{path.stat().st_mtime_ns}-{path.stat().st_size}" for path in files)


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise EmojiDiffusionError(
            f"{folder} should hold one .safetensors file and holds {len(files)}. Install the SUN node pack again."
        )
    return comfy.utils.load_torch_file(str(files[0]), safe_load=True)


def _load_exactly(module: torch.nn.Module, weights: dict[str, torch.Tensor], part: str) -> None:
    """load_state_dict that refuses anything missing or left over."""
    missing, unexpected = module.load_state_dict(weights, strict=False)
    wrong = [*missing, *unexpected]
    if wrong:
        raise EmojiDiffusionError(
            f"The {part} of Emoji Diffusion has {len(wrong)} tensors that do not fit, such as {wrong[0]}."
        )


# --------------------------------------------------------------------------------------------------------------- U-Net


def unet_config(config: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's UNetModel arguments for a diffusers UNet2DConditionModel config of the SD 1.x kind."""
    widths = config["block_out_channels"]
    layers = config["layers_per_block"]
    layers = [layers] * len(widths) if isinstance(layers, int) else list(layers)
    down = [int("CrossAttn" in kind) for kind in config["down_block_types"]]
    up = [int("CrossAttn" in kind) for kind in config["up_block_types"]]
    multiples = all(width % widths[0] == 0 for width in widths)  # all that ComfyUI's U-Net has words for
    fits = len(layers) == len(down) and config.get("transformer_layers_per_block", 1) == 1
    if down != up[::-1] or config.get("norm_num_groups", 32) != 32 or not fits or not multiples:
        raise EmojiDiffusionError("The U-Net of Emoji Diffusion is not of the SD 1.x kind; ComfyUI cannot express it.")
    return {
        "image_size": 32,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": layers,
        "transformer_depth": [depth for depth, count in zip(down, layers, strict=True) for _ in range(count)],
        "transformer_depth_middle": 1 if config.get("mid_block_type", True) else -2,  # -2: there is no middle
        # popped from the end
        "transformer_depth_output": [
            depth for depth, count in zip(down, layers, strict=True) for _ in range(count + 1)
        ],
        "context_dim": config["cross_attention_dim"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": bool(config.get("use_linear_projection", False)),
        "use_temporal_attention": False,
        "adm_in_channels": None,
        "num_classes": None,
        "legacy": False,
    }


def load_unet(
    folder: Path,
    latent_format: comfy.latent_formats.LatentFormat | None = None,
    changes: Path | None = None,
    compact: Path | None = None,
) -> comfy.model_patcher.ModelPatcher:
    """MODEL of a diffusers folder. `latent_format` differs from SD 1.5's only in the colours of previews."""
    config = _config(compact or folder / "unet") | ({"in_channels": 9} if changes else {})
    # diffusers' attention_head_dim is, for this model, the number of heads (a naming accident kept for old files).
    heads = config.get("num_attention_heads") or config["attention_head_dim"]

    model_config = comfy.supported_models.SD15(unet_config(config))
    model_config.unet_config["num_heads"] = heads  # SD15 sets its own 8
    model_config.sampling_settings = _sampling_settings(_config(folder / "scheduler", "scheduler_config.json"))
    model_config.latent_format = latent_format or model_config.latent_format
    weights = _compact_weights(folder / "unet", compact) if compact else _weights(folder / "unet")
    if changes is not None:
        try:
            weights = merge(weights, comfy.utils.load_torch_file(str(changes), safe_load=True), changes.name)
        except ValueError as error:
            raise EmojiDiffusionError(f"{error} Install the SUN node pack again.") from error
    try:  # not by ComfyUI's own table, which takes every stage to have as many layers
        weights = unet_tensors(weights, config, prefix="")
    except CompactError as error:
        raise EmojiDiffusionError(f"The U-Net of Emoji Diffusion has unknown tensors. {error}") from error

    device = comfy.model_management.get_torch_device()
    dtype = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=model_config.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    model_config.set_inference_dtype(
        dtype, comfy.model_management.unet_manual_cast(dtype, device, model_config.supported_inference_dtypes)
    )
    offload = comfy.model_management.unet_offload_device()
    model = model_config.get_model(weights, device=offload)
    # With ComfyUI's dynamic VRAM layers keep the dtype of what is loaded, not the one they were made for.
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    _load_exactly(model.diffusion_model, weights, "U-Net")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


def _compact_weights(base: Path, compact: Path) -> dict[str, torch.Tensor]:
    """The weights of `compact`, or, where that folder holds a plan alone, those of `base` without what the plan leaves
    out."""
    if not (compact / "plan.json").is_file() or any(compact.glob("*.safetensors")):
        return _weights(compact)
    try:
        return weights_by_plan(_weights(base), read_plan(compact / "plan.json"))
    except CompactError as error:
        raise EmojiDiffusionError(f"{error} Install the SUN node pack again.") from error


def _sampling_settings(scheduler: dict[str, Any]) -> dict[str, Any]:
    if scheduler["beta_schedule"] != "scaled_linear" or scheduler.get("prediction_type", "epsilon") != "epsilon":
        raise EmojiDiffusionError(
            "Emoji Diffusion's noise schedule is not Stable Diffusion's; ComfyUI cannot express it here."
        )
    return {
        "beta_schedule": "linear",  # ComfyUI's name for diffusers' "scaled_linear"
        "linear_start": scheduler["beta_start"],
        "linear_end": scheduler["beta_end"],
        "timesteps": scheduler["num_train_timesteps"],
    }


# ---------------------------------------------------------------------------------------------------------------- CLIP


class SmallClip(SDClipModel):
    """SD 1.x's text encoder at the size and vocabulary of `config` (transformers' CLIPTextConfig as a dict)."""

    def __init__(
        self,
        config: dict[str, Any],
        tokens: dict[str, int],
        device: Any = "cpu",
        dtype: Any = None,
        model_options: Any = None,
    ) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=config,
            special_tokens=tokens,
            return_projected_pooled=False,
            model_options=model_options or {},
        )
        # ComfyUI fixes CLIP's vocabulary at 49408 words.
        self.transformer.set_input_embeddings(
            self.operations.Embedding(config["vocab_size"], config["hidden_size"], device=device, dtype=dtype)
        )
        self.freeze()


def load_clip(folder: Path) -> comfy.sd.CLIP:
    config = _config(folder / "text_encoder")
    tokenizer = functools.partial(SDTokenizer, str(folder / "tokenizer"), embedding_size=config["hidden_size"])
    tokens = _special_tokens(tokenizer().tokenizer)
    tokenizer.keywords["pad_token"] = tokens["pad"]

    target = comfy.supported_models_base.ClipTarget(
        functools.partial(SD1Tokenizer, tokenizer=tokenizer),
        functools.partial(SD1ClipModel, clip_model=functools.partial(SmallClip, config, tokens)),
    )
    weights = _weights(folder / "text_encoder")
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=comfy.utils.calculate_parameters(weights),
    )
    weights = {
        name if name.startswith("text_model.") else f"text_model.{name}": weight for name, weight in weights.items()
    }
    weights.pop("text_model.embeddings.position_ids", None)
    # SD 1.x has none. Left alone it would hold noise, and under dynamic VRAM it is not there to be set before this.
    weights["text_projection.weight"] = torch.eye(config["hidden_size"])
    _load_exactly(clip.cond_stage_model.clip_l.transformer, weights, "text encoder")
    return clip


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    return {"start": tokenizer.bos_token_id, "end": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}


# ----------------------------------------------------------------------------------------------------------------- VAE


def load_vae(folder: Path) -> comfy.sd.VAE:
    """diffusers' AutoencoderTiny as ComfyUI's TAESD, between pixels and LATENTs in SD 1.5's scale."""
    config = _config(folder)
    weights = {_taesd_name(name): weight for name, weight in _weights(folder).items()}
    # A LATENT is the U-Net's latent divided by SD 1.5's factor; the autoencoder's is divided by its own.
    factor = comfy.latent_formats.SD15().scale_factor / config.get("scaling_factor", 1.0)
    weights["vae_scale"] = torch.tensor(factor)
    weights["vae_shift"] = torch.tensor(0.0)
    return comfy.sd.VAE(sd=weights)


def _taesd_name(name: str) -> str:
    """TAESD's name of an AutoencoderTiny tensor. TAESD counts the clamp its decoder starts with, diffusers does not."""
    match = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.+)", name)
    if match is None:
        raise EmojiDiffusionError(f"The VAE of Emoji Diffusion has a tensor {name}, which TAESD does not know.")
    side, number, rest = match.groups()
    return f"taesd_{side}.{int(number) + (side == 'decoder')}.{rest}"


def preview_format(vae: comfy.sd.VAE) -> comfy.latent_formats.SD15:
    """SD 1.5's latent format with this autoencoder's colours, for ComfyUI's live previews of kind "latent2rgb".

    Those are one linear map from latent channels to RGB, after a step that some formats use to rearrange channels. No
    linear map suits this autoencoder, so that step decodes, and the map leaves its colours as they are.
    """
    latent_format = comfy.latent_formats.SD15()
    decoder = copy.deepcopy(vae.first_stage_model).float()  # small; ComfyUI moves the VAE's own to and fro

    @torch.no_grad()
    def decoded(latents: torch.Tensor) -> torch.Tensor:
        """[B, 3, 8 h, 8 w] in -1..1 of the sampler's latents [B, 4, h, w]; the first picture alone is shown."""
        return decoder.to(latents.device).decode(latent_format.process_out(latents[:1].float())).to(latents.dtype)

    latent_format.latent_rgb_factors = torch.eye(3).tolist()
    latent_format.latent_rgb_factors_bias = [0.0] * 3
    latent_format.latent_rgb_factors_reshape = decoded
    latent_format.taesd_decoder_name = None  # SD 1.5's preview decoder belongs to another latent space
    return latent_format
