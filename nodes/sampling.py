"""The sampler behind SUN 4-step Sampler: the trained timesteps, one U-Net call a step, deterministic (DDIM, eta 0)."""

from __future__ import annotations

import logging
import math
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher

from ..sun.schedule import denoise_timesteps
from . import patch

log = logging.getLogger(__name__)


def trained_sigmas(model: ModelPatcher, steps: int, denoise: float = 1.0) -> torch.Tensor:
    """Sigmas [n + 1] of the trained (trailing) timesteps, ending at 0; `denoise` below 1 drops the first of them."""
    # The model object, not model.model.model_sampling: other nodes may have put another schedule over it.
    sampling = model.get_model_object("model_sampling")
    table = getattr(sampling, "sigmas", None)
    if table is None:
        raise ValueError("SUN needs a model with discrete timesteps, as Stable Diffusion 1.x has.")
    timesteps = denoise_timesteps(steps, denoise, mode="trained", num_train_timesteps=len(table))
    return torch.cat([table[list(timesteps)].float().cpu(), torch.zeros(1)]) if timesteps else torch.zeros(0)


def least_denoise(steps: int) -> float:
    """The least denoise, in the widget's hundredths, at which one of `steps` steps is run."""
    return math.ceil(100 / steps) / 100


def sample(
    model: ModelPatcher, positive: list, negative: list, latent: dict[str, Any], seed: int, steps: int, denoise: float
) -> dict[str, Any]:
    """Samples a LATENT with SUN. A denoise that leaves no step to run gives it back unchanged, with a warning.

    Raises ValueError, in a sentence, when the model has no SUN adapter.
    """
    if patch.settings_of(model) is None:
        raise ValueError(
            "This model has no SUN adapter, so 4 steps would only give a blur. "
            "Put the node Apply SUN to Model between the model loader and this sampler."
        )
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    sigmas = trained_sigmas(model, steps, denoise)
    if len(sigmas) > 1:
        noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
        samples = comfy.sample.sample_custom(
            model,
            noise,
            cfg=1.0,
            # In ComfyUI's space, DDIM with eta 0 (Eq. 9) is Euler. Its "ddim" draws other noise for inpainting.
            sampler=comfy.samplers.sampler_object("euler"),
            sigmas=sigmas,
            positive=positive,
            negative=negative,
            latent_image=samples,
            noise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
    else:
        log.warning(
            "SUN: denoise %g of %d steps leaves no step to run, so the latent comes back unchanged. "
            "Set denoise to %g or more, or use more steps.", denoise, steps, least_denoise(steps),
        )  # fmt: skip
    return {**latent, "samples": samples}
