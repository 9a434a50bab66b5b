"""Samplers in k-diffusion's space: get_sigmas, sample, sample_img2img, as both families have them (hosts.md F.5)."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from . import sd_samplers_cfg_denoiser, sd_samplers_common, sd_schedulers
from .shared import opts


def sample_euler(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any]) -> torch.Tensor:
    for sigma, following in itertools.pairwise(sigmas):
        denoised = model(x, sigma.expand(x.shape[0]), **extra_args)
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


def sample_dpmpp_2m(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any]) -> torch.Tensor:
    return sample_euler(model, x, sigmas, extra_args)  # another sampler of the host's list; its formula does not matter


class KDiffusionSampler(sd_samplers_common.Sampler):
    def __init__(self, funcname: str, sd_model: Any) -> None:
        super().__init__()
        self.func = globals()[funcname]
        self.model_wrap_cfg = sd_samplers_cfg_denoiser.make(self)
        self.model_wrap = self.model_wrap_cfg.inner_model

    def get_sigmas(self, p: Any, steps: int) -> torch.Tensor:
        name = (p.hr_scheduler if p.is_hr_pass else p.scheduler) or "Automatic"
        if name == "Automatic":
            name = self.config.options.get("scheduler", "simple")
        scheduler = sd_schedulers.schedulers_map[name]
        if not p.is_hr_pass:
            p.extra_generation_params["Schedule type"] = scheduler.label
        table = self.model_wrap.sigmas
        return scheduler.function(
            n=steps, sigma_min=float(table[0]), sigma_max=float(table[-1]), inner_model=self.model_wrap, device="cpu"
        )

    def _launch(self, p: Any, steps: int, x: Any, sigmas: Any, cond: Any, uncond: Any, image_cond: Any) -> Any:
        self.model_wrap_cfg.begin(p)
        self.last_latent = x
        self.sampler_extra_args = {
            "cond": cond, "uncond": uncond, "cond_scale": p.cfg_scale, "s_min_uncond": 0.0, "image_cond": image_cond
        }  # fmt: skip
        extra = self.sampler_extra_args
        return self.launch_sampling(steps, lambda: self.func(self.model_wrap_cfg, x, sigmas, extra_args=extra))

    def sample(self, p: Any, x: Any, cond: Any, uncond: Any, steps: Any = None, image_conditioning: Any = None) -> Any:
        steps = steps or p.steps
        sigmas = self.get_sigmas(p, steps)
        x = x * (torch.sqrt(1.0 + sigmas[0] ** 2) if opts.sgm_noise_multiplier else sigmas[0])
        return self._launch(p, steps, x, sigmas, cond, uncond, image_conditioning)

    def sample_img2img(
        self, p: Any, x: Any, noise: Any, cond: Any, uncond: Any, steps: Any = None, image_conditioning: Any = None
    ) -> Any:
        steps, t_enc = sd_samplers_common.setup_img2img_steps(p, steps)
        sigmas = self.get_sigmas(p, steps)[steps - t_enc - 1 :]
        self.model_wrap_cfg.init_latent = x
        return self._launch(p, t_enc + 1, x + noise * sigmas[0], sigmas, cond, uncond, image_conditioning)
