"""Samplers in k-diffusion's space: get_sigmas, sample, sample_img2img, as both families have them."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from . import sd_samplers_cfg_denoiser, sd_samplers_common
from .shared import opts, state

try:
    from . import sd_schedulers
except ImportError:  # Forge Classic: a schedule belongs to its sampler
    sd_schedulers = None  # type: ignore[assignment]


def steps_of(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, Any]]:
    """(number, sigma here, sigma there, the function that asks the model for its direction at x and a sigma)."""

    def slope(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (x - model(x, sigma * x.new_ones(x.shape[0]), **extra_args)) / sigma

    for i, (here, there) in enumerate(itertools.pairwise(sigmas)):
        yield i, here, there, slope
        state.sampling_step = i  # by the host's callback


def sample_euler(
    model: Any, x: Any, sigmas: Any, extra_args: Any = None, callback: Any = None, disable: Any = None,
    s_churn: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    for _, here, there, slope in steps_of(model, x, sigmas, extra_args):
        x = x + slope(x, here) * (there - here)
    return x


def sample_euler_ancestral(
    model: Any, x: Any, sigmas: Any, extra_args: Any = None, callback: Any = None, disable: Any = None, eta: float = 1.0
) -> torch.Tensor:
    for _, here, there, slope in steps_of(model, x, sigmas, extra_args):
        up = eta * there * (1 - (there / here) ** 2).sqrt()
        down = (there**2 - up**2).sqrt()
        x = x + slope(x, here) * (down - here) + up * torch.ones_like(x)
    return x


def sample_heun(
    model: Any, x: Any, sigmas: Any, extra_args: Any = None, callback: Any = None, disable: Any = None,
    s_churn: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    for _, here, there, slope in steps_of(model, x, sigmas, extra_args):
        first = slope(x, here)
        ahead = x + first * (there - here)
        x = ahead if there == 0 else x + (first + slope(ahead, there)) / 2 * (there - here)
    return x


def sample_dpm_2(
    model: Any, x: Any, sigmas: Any, extra_args: Any = None, callback: Any = None, disable: Any = None,
    s_churn: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    for _, here, there, slope in steps_of(model, x, sigmas, extra_args):
        direction, middle = slope(x, here), (here * there).sqrt()
        if there > 0:
            direction = slope(x + direction * (middle - here), middle)
        x = x + direction * (there - here)
    return x


def sample_dpmpp_2m(
    model: Any, x: Any, sigmas: Any, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> torch.Tensor:
    before: Any = None
    for i, here, there, slope in steps_of(model, x, sigmas, extra_args):
        denoised = x - here * slope(x, here)
        ahead = denoised
        if before is not None and there > 0:
            ratio = (sigmas[i - 1] / here).log() / (here / there).log()
            ahead = denoised + (denoised - before) / (2 * ratio)
        x, before = there / here * x + (1 - there / here) * ahead, denoised
    return x


def sample_dpm_fast(
    model: Any, x: Any, sigma_min: float, sigma_max: float, n: int, extra_args: Any = None, callback: Any = None,
    disable: Any = None,
) -> torch.Tensor:  # fmt: skip
    """Levels of its own, as k-diffusion's has them; here with steps of Euler."""
    sigmas = torch.logspace(math.log10(sigma_max), math.log10(sigma_min), n)
    return sample_euler(model, x, torch.cat([sigmas, torch.zeros(1)]), extra_args)


class KDiffusionSampler(sd_samplers_common.Sampler):
    def __init__(self, funcname: str, sd_model: Any) -> None:
        super().__init__()
        self.func = globals()[funcname]
        self.model_wrap_cfg = sd_samplers_cfg_denoiser.make(self)
        self.model_wrap = self.model_wrap_cfg.inner_model

    def get_sigmas(self, p: Any, steps: int) -> torch.Tensor:
        steps += opts.always_discard_next_to_last_sigma
        sigmas = self.sigmas_of(p, steps)
        return torch.cat([sigmas[:-2], sigmas[-1:]]) if opts.always_discard_next_to_last_sigma else sigmas

    def sigmas_of(self, p: Any, steps: int) -> torch.Tensor:
        if sd_schedulers is None:
            table = self.model_wrap.sigmas
            return torch.tensor([float(table[-(1 + int(i * len(table) / steps))]) for i in range(steps)] + [0.0])
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

    def levels_for_function(self, steps: int, sigmas: torch.Tensor) -> dict[str, Any]:
        if "sigmas" in inspect.signature(self.func).parameters:
            return {"sigmas": sigmas}
        table = self.model_wrap.sigmas
        return {"sigma_min": float(table[0]), "sigma_max": float(table[-1]), "n": steps}

    def _launch(self, p: Any, steps: int, x: Any, sigmas: Any, cond: Any, uncond: Any, image_cond: Any) -> Any:
        extra = self.initialize(p, x, cond, uncond, image_cond) | self.levels_for_function(steps, sigmas)
        return self.launch_sampling(
            steps,
            lambda: self.func(
                self.model_wrap_cfg, x, extra_args=self.sampler_extra_args, disable=False, callback=None, **extra
            ),
        )

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
