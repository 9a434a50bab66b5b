"""Settings that do not go with SUN, said once a run: an error where the picture would be wrong, else a warning."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import comfy.model_sampling
import torch

log = logging.getLogger(__name__)

RIGHT = "4 steps, cfg 1.0, euler, ddim or dpmpp_2m, scheduler simple (or the sigmas of SUN Scheduler)"

# Samplers of ComfyUI that add new noise on the way, and those that ask the U-Net between the steps as well.
NOISY = ("ancestral", "sde", "ddpm", "lcm", "seeds", "sa_solver")
TWICE = ("heun", "heunpp2", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpm_fast", "dpm_adaptive",
         "seeds_2", "seeds_3", "sa_solver_pece")  # fmt: skip


def check_effect(effect: tuple[float, float]) -> None:
    """Raises ValueError unless SUN acts somewhere between start_percent and end_percent."""
    start, end = effect
    if not 0.0 <= start < end <= 1.0:
        raise ValueError(
            f"SUN would act nowhere between start_percent {start:g} and end_percent {end:g}. "
            f"Set start_percent below end_percent; 0 and 1 are the whole run."
        )


def check_run(guider: Any, sampler: Any, sigmas: torch.Tensor, latent: torch.Tensor) -> None:
    """Warns of settings that make a run slower or its picture worse. Raises ValueError where it would be wrong."""
    sampling = guider.model_patcher.get_model_object("model_sampling")
    cfg = getattr(guider, "cfg", 1.0)
    if abs(cfg - 1.0) > 1e-6:
        log.warning(
            "SUN: cfg is %g, so each step costs two U-Net calls and the guidance counts twice. "
            "SUN has the guidance in its weights: set cfg to 1.0.", cfg,
        )  # fmt: skip
    if isinstance(sampling, comfy.model_sampling.V_PREDICTION):
        log.warning(
            "SUN: this model predicts v, and adapters are trained on models that predict noise; see if it fits."
        )
    table = getattr(sampling, "sigmas", None)
    if table is not None and len(sigmas) > 1:
        _check_timesteps(_timesteps(table, sigmas), len(table), empty=not torch.count_nonzero(latent))
    _check_sampler(sampler)


def _timesteps(table: torch.Tensor, sigmas: torch.Tensor) -> list[int]:
    """The timestep nearest to each sigma; -1 for sigma 0, one before the first."""
    logs = table.detach().float().cpu().log()
    found = (sigmas.detach().float().cpu().clamp(min=1e-10).log()[:, None] - logs[None, :]).abs().argmin(dim=1)
    return [-1 if sigma == 0.0 else t for sigma, t in zip(sigmas.tolist(), found.tolist(), strict=True)]


def _check_timesteps(timesteps: list[int], total: int, empty: bool) -> None:
    """timesteps: of each sigma, the last one's included; total: how many the model has."""
    if empty and timesteps[0] < 0.95 * (total - 1):
        raise ValueError(
            f"Sampling starts at timestep {timesteps[0]} of {total - 1}, and the latent is empty: the picture would "
            f"come out grey and flat. For a picture from nothing choose {RIGHT} and denoise 1.0; for image to image "
            f"connect VAE Encode to the latent input."
        )
    lengths = [a - b for a, b in itertools.pairwise(timesteps)]
    mean = (timesteps[0] - timesteps[-1]) / len(lengths)
    if any(abs(length - mean) > max(2.0, 0.2 * mean) for length in lengths):
        log.warning(
            "SUN: these sigmas visit the timesteps %s, and adapters are trained for steps of equal length that begin "
            "with the noisiest (4 steps: 999, 749, 499, 249). The picture will be worse. Choose %s.",
            ", ".join(str(t) for t in timesteps[:-1]), RIGHT,
        )  # fmt: skip


def _check_sampler(sampler: Any) -> None:
    function = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    name = function.removeprefix("sample_").removesuffix("_gpu").removesuffix("_function")
    options = getattr(sampler, "extra_options", {})
    quiet = options.get("eta", 1.0) == 0.0 or options.get("s_noise", 1.0) == 0.0
    if (any(kind in name for kind in NOISY) or options.get("s_churn", 0.0) > 0.0) and not quiet:
        log.warning(
            "SUN: the sampler %s adds new noise at every step, and adapters are trained for deterministic steps. "
            "Choose euler, ddim or dpmpp_2m.", name,
        )  # fmt: skip
    if name in TWICE:
        log.warning(
            "SUN: the sampler %s asks the U-Net more than once a step, between the trained timesteps too. "
            "Choose euler, ddim or dpmpp_2m.", name,
        )  # fmt: skip
