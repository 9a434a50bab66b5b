"""diffusers' Stable Diffusion pipelines, one for each kind of run."""

from __future__ import annotations

from typing import Any

from diffusers import (
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

PIPELINES: dict[tuple[bool, bool, bool], Any] = {
    (False, False, False): StableDiffusionPipeline,
    (False, True, False): StableDiffusionImg2ImgPipeline,
    (False, True, True): StableDiffusionInpaintPipeline,
    (True, False, False): StableDiffusionControlNetPipeline,
    (True, True, False): StableDiffusionControlNetImg2ImgPipeline,
    (True, True, True): StableDiffusionControlNetInpaintPipeline,
}
"""By whether a run has (a picture for a ControlNet, a picture to start from, a mask)."""
