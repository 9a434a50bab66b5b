"""The samplers of the pack: the trained timesteps, one U-Net call a step, deterministic (DDIM, eta 0)."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher

from ..sun.schedule import DenoiseMode, denoise_timesteps
from . import checks, sun_patch
from .sun_patch import WHOLE_RUN, RunReport

log = logging.getLogger(__name__)

FinalStep = Literal["host", "diffusers"]


class Guider(comfy.samplers.CFGGuider):
    """ComfyUI's guider with both prompts and cfg 1: the negative one acts through the adapter.

    effect: shares of the run between which SUN acts. After a run `sun_report` tells what happened. Raises ValueError,
    in a sentence, for a model without SUN or an effect that ends before it starts.
    """

    def __init__(
        self, model: ModelPatcher, positive: list, negative: list, effect: tuple[float, float] = WHOLE_RUN
    ) -> None:
        if sun_patch.settings_of(model) is None:
            raise ValueError(
                "This model has no SUN adapter, so 4 steps would only give a blur. "
                "Put the node Apply SUN to Model between the model loader and this node."
            )
        checks.check_effect(effect)
        super().__init__(model)
        self.set_conds(positive, negative)
        self.set_cfg(1.0)
        self.sun_effect = effect
        self.sun_report: RunReport | None = None

    def sample(
        self,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        sampler: Any,
        sigmas: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As ComfyUI's. Raises ValueError when there is neither a step to run nor a picture to give back."""
        checks.check_something_runs(sigmas, latent_image)
        return super().sample(noise, latent_image, sampler, sigmas, *args, **kwargs)


def trained_sigmas(
    model: ModelPatcher, steps: int, denoise: float = 1.0, mode: DenoiseMode = "trained", final: FinalStep = "host"
) -> torch.Tensor:
    """Sigmas [n + 1] of the trained (trailing) timesteps. Empty, with a warning, when no step is left to run.

    denoise: below 1 it keeps part of a picture: "trained" drops the first timesteps, "respaced" spreads all `steps`
    over what is left. final: "host" ends at sigma 0, "diffusers" at timestep 0's (`finished_as_diffusers`).
    """
    # The model object, not model.model.model_sampling: other nodes may have put another schedule over it.
    sampling = model.get_model_object("model_sampling")
    table = getattr(sampling, "sigmas", None)
    if table is None:
        raise ValueError("SUN needs a model with discrete timesteps, as Stable Diffusion 1.x has.")
    timesteps = denoise_timesteps(steps, denoise, mode, num_train_timesteps=len(table))
    if not timesteps:
        log.warning(
            "SUN: denoise %g of %d steps leaves no step to run, so the latent comes back unchanged. "
            "Set denoise to %g or more, or use more steps.",
            denoise,
            steps,
            least_denoise(steps, mode),
        )
        return torch.zeros(0)
    table = table.float().cpu()
    return torch.cat([table[list(timesteps)], torch.zeros(1) if final == "host" else table[:1]])


def least_denoise(steps: int, mode: DenoiseMode = "trained") -> float:
    """The least denoise, in the widget's hundredths, at which one of `steps` steps is run."""
    return math.ceil(100 / steps) / 100 if mode == "trained" else 0.01


def finished_as_diffusers(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
) -> torch.Tensor:
    """Euler down to the sigma of timestep 0, as diffusers' DDIM ends with set_alpha_to_one=False (SD 1.5's setting).

    diffusers' latents are those of ComfyUI divided by sqrt(1 + sigma^2), which is 1 only at sigma 0. What a mask keeps
    is put back without that last noise.
    """
    x = comfy.k_diffusion.sampling.sample_euler(model, x, sigmas, extra_args, callback, disable)
    x = x / (1.0 + sigmas[-1] ** 2) ** 0.5
    mask = (extra_args or {}).get("denoise_mask")
    return x if mask is None else x * mask + model.latent_image * (1.0 - mask)


def sample(
    model: ModelPatcher,
    positive: list,
    negative: list,
    latent: dict[str, Any],
    seed: int,
    steps: int,
    denoise: float,
    mode: DenoiseMode = "trained",
    final: FinalStep = "host",
    effect: tuple[float, float] = WHOLE_RUN,
) -> tuple[dict[str, Any], str]:
    """Samples a LATENT with SUN; returns it and a line on what happened. Without a step to run it comes back unchanged.

    Raises ValueError, in a sentence, when the model has no SUN adapter or the settings cannot work.
    """
    guider = Guider(model, positive, negative, effect)
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    sigmas = trained_sigmas(model, steps, denoise, mode, final)
    if len(sigmas) == 0:
        checks.check_something_runs(sigmas, samples)
        return {**latent, "samples": samples}, f"0 U-Net calls: denoise {denoise:g} leaves no step to run"
    # In ComfyUI's space, DDIM with eta 0 (Eq. 9) is Euler. Its "ddim" draws other noise for inpainting.
    sampler = (
        comfy.samplers.sampler_object("euler") if final == "host" else comfy.samplers.KSAMPLER(finished_as_diffusers)
    )
    samples = guider.sample(
        comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")),
        samples,
        sampler,
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    ).to(comfy.model_management.intermediate_device())
    return {**latent, "samples": samples}, str(guider.sun_report)
