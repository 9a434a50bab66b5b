"""A model under test, ready to sample: weights, LoRA, adapters and the folders of its peers."""

from __future__ import annotations

from typing import Any

import torch

from ..adapter import SunAdapter
from ..common.devices import pick_device
from ..common.worlds import EMOJI
from ..pictures.recipe import split_lora
from ..pipelines.loading import load_pipeline, load_unet, require_text_to_image
from ..pipelines.lora import apply_lora
from ..shipped import SINGLE_FILE_CONFIG, adapter_file, guidance_of
from ..surgery import from_unet
from .cells import processes
from .config import EvaluateConfig, ModelSpec
from .sampler import WEIGHTS, Sampler

PAPER_W = 8.0  # of an adapter that states no scale


def device_of(config: EvaluateConfig) -> torch.device:
    """Where an evaluation computes: the configured device, else the process's own."""
    return torch.device(pick_device(config.device)) if config.device else processes().device


def load_sampler(config: EvaluateConfig, spec: ModelSpec | None = None) -> Sampler:
    """The sampler of one model; without ``spec``, of the model that ``config`` itself names.

    Raises ConfigError, RecipeError or SunFileError with what to do.
    """
    spec = spec or ModelSpec(
        config.model,
        lora=config.lora,
        adapter=config.adapter,
        lcm_lora=config.lcm_lora,
        guided_distill=config.guided_distill,
        guidance_scale=config.guidance_scale,
    )
    device = device_of(config)
    pipe = _load_pipeline(spec, device)
    dtype = WEIGHTS.get(config.precision, torch.float32)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.to(device).eval().requires_grad_(False)
        if dtype != module.dtype:
            module.to(dtype)
    adapter = _load_adapter(spec.adapter, pipe.unet, optional=spec.model != EMOJI)
    more = {name: _load_adapter(file, pipe.unet) for name, file in config.adapters.items()}
    own = guidance_of(spec.model) if adapter is None else adapter.info.guidance_scale or PAPER_W
    w = spec.guidance_scale or own
    return Sampler(
        pipe.unet,
        pipe.vae,
        pipe.text_encoder,
        pipe.tokenizer,
        pipe.scheduler,
        adapter=adapter,
        w=w,
        resolution=config.resolution,
        adapters={n: a for n, a in more.items() if a is not None},
        lcm_lora=spec.lcm_lora,
        guided_distill=spec.guided_distill,
        unets=config.unets,
    )


def _load_pipeline(spec: ModelSpec, device: torch.device) -> Any:
    if spec.model == "random":
        return random_stable_diffusion()
    pipe = load_pipeline(spec.model, torch.float32)
    if spec.lora:  # part of the model under test: every method sees the same weights
        apply_lora(pipe, *split_lora(spec.lora))
    if spec.unet:
        pipe.unet = load_unet(spec.unet)
    require_text_to_image(pipe, spec.unet or spec.model)
    return pipe.to(device)


def random_stable_diffusion(seed: int = 0) -> Any:
    """Stable Diffusion 1.5 with random weights: what calls cost does not depend on what they compute."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = SINGLE_FILE_CONFIG
    torch.manual_seed(seed)
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": DDIMScheduler.from_pretrained(folder / "scheduler"),
    }
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _load_adapter(name: str, unet: Any, optional: bool = False) -> SunAdapter | None:
    """An adapter file; ``emoji`` or nothing for the shipped one, ``init`` for an untrained one.

    The shipped adapter fits the shipped model alone: with ``optional`` a model that it does not fit has none.
    """
    device = next(unet.parameters()).device
    if name == "init":
        return from_unet(unet).eval().requires_grad_(False)
    adapter = SunAdapter.load(adapter_file(name or EMOJI), dtype=torch.float32).to(device)
    if not name and optional:
        from ..layers import layers_of_unet

        widths = tuple(layer.channels for layer in layers_of_unet(unet))
        if (widths, unet.config.cross_attention_dim) != (adapter.channels, adapter.text_width):
            return None
    return adapter.requires_grad_(False)
