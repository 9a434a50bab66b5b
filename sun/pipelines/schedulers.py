"""The diffusers schedulers SUN is sampled with, on the exact trailing timesteps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from ..prediction import check_prediction, clean_latents
from ..schedule import alpha_sigma, ddim_step

SCHEDULERS = ("ddim", "dpmpp_2m", "unipc", "euler")


class TrailingDDIMScheduler(DDIMScheduler):
    """DDIM, eta 0, that steps to the next timestep of its own list (Eq. 9).

    diffusers' DDIM assumes every step is ``T // steps`` long, which misses the trailing timesteps for
    3, 6, 7, ... steps.
    """

    def step(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Take ``sample`` [B, C, H, W] at ``timestep`` one step on. Raises PredictionError for odd predictions."""
        t = int(timestep)
        later = [s for s in self.timesteps.tolist() if s < t]
        a_t, s_t = (v.to(sample.device) for v in alpha_sigma(self.alphas_cumprod, t))
        if later:
            a_s, s_s = (v.to(sample.device) for v in alpha_sigma(self.alphas_cumprod, later[0]))
        else:
            a_s, s_s = self.final_alpha_cumprod.sqrt(), (1 - self.final_alpha_cumprod).sqrt()
        kind = self.config.prediction_type
        clean, eps = clean_latents(kind, model_output, sample, a_t, s_t)
        # Eq. 9 as it stands divides by a_t, which is 0 at zero terminal SNR
        exact = kind == "epsilon"
        previous = ddim_step(sample, eps, a_t, s_t, a_s, s_s) if exact else a_s * clean + s_s * eps
        previous = previous.to(sample.dtype)
        return DDIMSchedulerOutput(previous, clean) if return_dict else (previous, clean)


def prediction_of(config: Mapping[str, Any]) -> tuple[str, float]:
    """What a model with this scheduler config predicts, and alphas_cumprod of its noisiest timestep."""
    schedule = DDIMScheduler.from_config(config)
    return str(config.get("prediction_type", "epsilon")), float(schedule.alphas_cumprod[-1])


# Of a model's own scheduler: they would choose other timesteps, or change the predictions.
_OWN_SCHEDULES = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "thresholding",
)


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """Scheduler ``name`` (one of ``SCHEDULERS``) on the noise schedule of ``config``, trailing, ending at sigma 0.

    ``ddim`` is what SUN was trained for; ``dpmpp_2m`` is DPM-Solver++ of second order; ``euler`` works on the same
    sigmas as samplers of that name elsewhere. Raises ValueError for another name, PredictionError (one too) for a
    model that predicts what cannot be sampled.
    """
    check_prediction(*prediction_of(config), adapter=False)
    common: dict[str, Any] = {"timestep_spacing": "trailing", **dict.fromkeys(_OWN_SCHEDULES, False)}
    if name == "ddim":
        return TrailingDDIMScheduler.from_config(config, **common, set_alpha_to_one=True, clip_sample=False)
    if name == "dpmpp_2m":
        solver = {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
        return DPMSolverMultistepScheduler.from_config(config, **common, **solver)
    if name == "unipc":
        return UniPCMultistepScheduler.from_config(config, **common, final_sigmas_type="zero")
    if name == "euler":
        return EulerDiscreteScheduler.from_config(config, **common, final_sigmas_type="zero")
    raise ValueError(f"scheduler {name!r} is unknown; choose one of {', '.join(SCHEDULERS)}")
