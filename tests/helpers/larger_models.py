"""Pipelines of larger models, at their shape and with very few random weights: (pipeline, arguments of a call)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

TEXT_WIDTH = 16
SIZE = {"height": 64, "width": 64}
Made = tuple[Any, dict[str, Any]]


def _texts(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(1, *shape) for shape in shapes]


def sdxl() -> Made:
    """Stable Diffusion XL: a U-Net that is also told sizes and a pooled text."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=TEXT_WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), attention_head_dim=2, norm_num_groups=4,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=40,
    ).eval()  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(timestep_spacing="trailing")
    pipe = StableDiffusionXLPipeline(vae, None, None, None, None, unet, scheduler)
    text, pooled = _texts((5, TEXT_WIDTH), (16,))
    return pipe, {"prompt_embeds": text, "negative_prompt_embeds": -text, "pooled_prompt_embeds": pooled,
                  "negative_pooled_prompt_embeds": -pooled, **SIZE}  # fmt: skip


def sd3() -> Made:
    """Stable Diffusion 3: a transformer on flow matching, with guidance in a batch of two."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH, caption_projection_dim=8, pooled_projection_dim=16, out_channels=4,
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = StableDiffusion3Pipeline(transformer, scheduler, AutoencoderTiny(), None, None, None, None, None, None)
    text, pooled = _texts((5, TEXT_WIDTH), (16,))
    return pipe, {"prompt_embeds": text, "negative_prompt_embeds": -text, "pooled_prompt_embeds": pooled,
                  "negative_pooled_prompt_embeds": -pooled, **SIZE}  # fmt: skip


def text_to_video() -> Made:
    """ModelScope's text to video: a U-Net of three dimensions."""
    from diffusers import TextToVideoSDPipeline, UNet3DConditionModel

    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=TEXT_WIDTH,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=4, norm_num_groups=4,
    ).eval()  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(timestep_spacing="trailing")
    pipe = TextToVideoSDPipeline(AutoencoderTiny(), None, None, unet, scheduler)
    (text,) = _texts((5, TEXT_WIDTH))
    return pipe, {"prompt_embeds": text, "negative_prompt_embeds": -text, "num_frames": 2, **SIZE}


def animatediff() -> Made:
    """AnimateDiff: Stable Diffusion 1.x with a motion module between its layers."""
    from diffusers import AnimateDiffPipeline, MotionAdapter, UNet2DConditionModel, UNetMotionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=TEXT_WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    motion = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )
    scheduler = DPMSolverMultistepScheduler(timestep_spacing="trailing", beta_schedule="linear")
    whole = UNetMotionModel.from_unet2d(unet, motion).eval()
    pipe = AnimateDiffPipeline(None, None, None, whole, motion, scheduler)
    (text,) = _texts((5, TEXT_WIDTH))
    return pipe, {"prompt_embeds": text, "negative_prompt_embeds": -text, "num_frames": 3, **SIZE}


def flux() -> Made:
    """Flux: guidance distilled into the transformer, one row a picture."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).eval()  # fmt: skip
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, None, None, None, transformer)
    text, pooled = _texts((5, TEXT_WIDTH), (16,))
    return pipe, {"prompt_embeds": text, "pooled_prompt_embeds": pooled, **SIZE}


def wan() -> Made:
    """Wan's text to video: guidance in two calls a step, UniPC on flow matching."""
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=TEXT_WIDTH, freq_dim=32, ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, None, scheduler, transformer=transformer)
    (text,) = _texts((5, TEXT_WIDTH))
    return pipe, {"prompt_embeds": text, "negative_prompt_embeds": -text, "num_frames": 5, **SIZE}


def ltx() -> Made:
    """LTX video: a transformer on packed latents."""
    from diffusers import LTXPipeline, LTXVideoTransformer3DModel

    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=1, caption_channels=TEXT_WIDTH,
    ).eval()  # fmt: skip
    pipe = LTXPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)
    (text,) = _texts((5, TEXT_WIDTH))
    mask = torch.ones(1, 5, dtype=torch.bool)
    return pipe, {"prompt_embeds": text, "negative_prompt_embeds": -text, "prompt_attention_mask": mask,
                  "negative_prompt_attention_mask": mask, "num_frames": 9, **SIZE}  # fmt: skip


def cogvideox() -> Made:
    """CogVideoX: a transformer that predicts v, with DDIM."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=TEXT_WIDTH, num_layers=1, sample_width=8, sample_height=8, sample_frames=9,
        max_text_seq_length=5, temporal_compression_ratio=4,
    ).eval()  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    pipe = CogVideoXPipeline(None, None, None, transformer, scheduler)
    (text,) = _texts((5, TEXT_WIDTH))
    return pipe, {"prompt_embeds": text, "negative_prompt_embeds": -text, "num_frames": 9, **SIZE}


LARGER = {
    "SDXL": sdxl, "SD 3": sd3, "text to video": text_to_video, "AnimateDiff": animatediff, "Flux": flux, "Wan": wan,
    "LTX": ltx, "CogVideoX": cogvideox,
}  # fmt: skip
