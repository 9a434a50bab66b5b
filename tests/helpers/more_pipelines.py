"""Tiny pipelines of many kinds, and what each needs besides prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from tiny import SHORT_STAGES, TEXT_WIDTH, make_short_unet

FRAMES = 2


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def motion_adapter() -> Any:
    torch.manual_seed(21)
    made = diffusers.MotionAdapter(
        block_out_channels=SHORT_STAGES,
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=16,
    )
    return _all_at_work(made)


def t2i_adapter(seed: int = 22) -> Any:
    torch.manual_seed(seed)
    return diffusers.T2IAdapter(channels=list(SHORT_STAGES), num_res_blocks=1, downscale_factor=8).eval()


def sparse_controlnet() -> Any:
    torch.manual_seed(23)
    made = diffusers.SparseControlNetModel(
        conditioning_channels=3,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        layers_per_block=1,
        block_out_channels=SHORT_STAGES,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
        motion_num_attention_heads=2,
        motion_max_seq_length=16,
        conditioning_embedding_out_channels=(4, 4, 4, 4),
        use_simplified_condition_embedding=False,
    )
    return _all_at_work(made)


def _all_at_work(model: Any) -> Any:
    """Its last layers start at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def controlnet(unet: Any) -> Any:
    torch.manual_seed(24)
    made = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 4))
    return _all_at_work(made)


def build(make_pipeline: Callable[..., Any], kind: Any) -> Any:
    """A pipeline of diffusers by its class's name, or of a class, with every part it asks for."""
    cls = getattr(diffusers, kind) if isinstance(kind, str) else kind
    name, unet = cls.__name__, make_short_unet()
    parts = {**make_pipeline(unet=unet).components, "requires_safety_checker": False}
    if "SparseControlNet" in name:
        parts["controlnet"] = sparse_controlnet()
    elif "ControlNet" in name:
        parts["controlnet"] = controlnet(unet)
    if "AnimateDiff" in name:
        parts["motion_adapter"] = motion_adapter()
    if "AdapterPipeline" in name:
        parts["adapter"] = t2i_adapter()
    asked = inspect.signature(cls.__init__).parameters
    pipe = cls(**{part: value for part, value in parts.items() if part in asked})
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.eval()
    return pipe


def inputs(pipe: Any, strength: float = 1.0) -> dict[str, Any]:
    """What a call needs besides prompts, by what it takes."""
    asked, name = inspect.signature(pipe.__call__).parameters, type(pipe).__name__
    given: dict[str, Any] = {}
    if "video" in asked:
        given |= {"video": [picture(i) for i in range(FRAMES)], "strength": strength}
    elif "num_frames" in asked:
        given |= {"num_frames": FRAMES, "height": 64, "width": 64}
    if "conditioning_frames" in asked:
        sparse = "controlnet_frame_indices" in asked
        given["conditioning_frames"] = [picture(9)] if sparse else [picture(i + 5) for i in range(FRAMES)]
    if "control_image" in asked:
        given["control_image"] = picture(1)
    if "image" in asked and "video" not in asked:
        given["image"] = picture(1) if "AdapterPipeline" in name else picture()
    if "strength" in asked:
        given["strength"] = strength
    if "mask_image" in asked:
        mask = np.zeros((64, 64), dtype=np.uint8)
        mask[:, 32:] = 255
        given["mask_image"] = Image.fromarray(mask)
    return given


def draw(pipe: Any, prompt: Any = "a cat", negative: Any = "a dog", steps: int = 2, **options: Any) -> torch.Tensor:
    """Latents of a run: [B, 4, 8, 8], or of a video [B, 4, frames, 8, 8]."""
    given = {**inputs(pipe), "output_type": "latent", "generator": torch.Generator().manual_seed(1), **options}
    result = pipe(prompt=prompt, negative_prompt=negative, num_inference_steps=steps, **given)
    return result.frames if hasattr(result, "frames") else result.images
