"""The sampler "SUN" and the schedule "SUN Trailing" in the host's lists.

The sampler is the host's Euler (DDIM with eta 0 in its space, Eq. 9) with three differences: it starts from the noise
diffusers starts from, uses the trained timesteps for image to image, and does nothing where nothing is to be done.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
from modules import sd_samplers, sd_samplers_common, sd_samplers_kdiffusion, sd_schedulers, shared

from ..sun.schedule import denoise_timesteps, trailing_timesteps

log = logging.getLogger(__name__)

SAMPLER = "SUN"
SCHEDULE = "sun_trailing"
SCHEDULE_LABEL = "SUN Trailing"


def sigmas_at(table: torch.Tensor, timesteps: list[int]) -> torch.Tensor:
    """Sigmas [n + 1] of timesteps, ending at 0. table: the host's sigma of every training timestep."""
    return torch.cat([table.detach().float().cpu()[timesteps], torch.zeros(1)])


def trailing_sigmas(n: int, sigma_min: float, sigma_max: float, inner_model: Any, device: Any) -> torch.Tensor:
    """The host's scheduler function: `n` trained (trailing) timesteps of the model.

    There are no more than the model has. The host asks for more where it uses the end of a long schedule alone; in
    front of the others the first is repeated.
    """
    total = len(inner_model.sigmas)
    sigmas = sigmas_at(inner_model.sigmas, trailing_timesteps(min(n, total), total))
    return torch.cat([sigmas[:1].expand(max(n - total, 0)), sigmas]).to(device)


def register() -> None:
    """Adds both to the host's lists, in the place of an earlier registration ("Reload UI" runs this again)."""
    scheduler = sd_schedulers.Scheduler(SCHEDULE, SCHEDULE_LABEL, trailing_sigmas, need_inner_model=True)
    _put(sd_schedulers.schedulers, scheduler)
    sd_schedulers.schedulers_map.update({SCHEDULE: scheduler, SCHEDULE_LABEL: scheduler})

    sampler = sd_samplers_common.SamplerData(
        SAMPLER, lambda model: sampler_class()(model), ["sun"], {"scheduler": SCHEDULE}
    )
    _put(sd_samplers.all_samplers, sampler)
    sd_samplers.all_samplers_map[SAMPLER] = sampler
    sd_samplers.set_samplers()
    clear = getattr(getattr(sd_samplers, "get_sampler_and_scheduler", None), "cache_clear", None)
    if clear:
        clear()  # it may have been asked for "SUN" before there was one


def _put(entries: list[Any], entry: Any) -> None:
    entries[:] = [other for other in entries if other.name != entry.name] + [entry]


def denoise_mode(p: Any) -> str:
    """How image to image counts its steps: the run's setting, else that of the settings page."""
    run = getattr(p, "sun_run", None)
    return run.settings.denoise_mode if run else getattr(shared.opts, "sun_denoise_mode", "trained")


def say_if_bare(p: Any) -> None:
    """Says that the sampler runs without guidance and without the adapter, as in the second pass of extensions that
    take over the sampler and the CFG scale of the first but not its scripts."""
    if getattr(p, "sun_run", None) is None and p.cfg_scale <= 1:
        text = (
            "SUN: the sampler SUN ran at CFG 1 without the adapter, so nothing guided the picture. Switch SUN on; in "
            "ADetailer, add sun_script to the script names in its settings."
        )
        log.warning(text)
        p.comment(text)


@functools.cache
def sampler_class() -> type:
    """The sampler, made from the host's own class when it is first needed."""

    class SunSampler(sd_samplers_kdiffusion.KDiffusionSampler):
        """Euler on the trained timesteps."""

        def __init__(self, sd_model: Any) -> None:
            super().__init__("sample_euler", sd_model)
            self.img2img_sigmas: torch.Tensor | None = None

        def get_sigmas(self, p: Any, steps: int) -> torch.Tensor:
            sigmas = super().get_sigmas(p, steps)
            if self.img2img_sigmas is None:
                return sigmas
            # The caller takes the end of a longer schedule; what stands before it is never used.
            wanted = self.img2img_sigmas
            return torch.cat([wanted.new_zeros(max(steps + 1 - len(wanted), 0)), wanted])

        def sample(self, p: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            """x: noise [B, 4, H, W]. The host scales it by sigma; the trajectory begins at sqrt(1 + sigma^2)."""
            say_if_bare(p)
            if not getattr(shared.opts, "sgm_noise_multiplier", False):
                first = float(self.get_sigmas(p, kwargs.get("steps") or p.steps)[0])
                x = x * (math.sqrt(1.0 + first**2) / first)
            return super().sample(p, x, *args, **kwargs)

        def sample_img2img(
            self, p: Any, x: torch.Tensor, noise: torch.Tensor, conditioning: Any, unconditional: Any,
            steps: int | None = None, image_conditioning: Any = None,
        ) -> torch.Tensor:  # fmt: skip
            say_if_bare(p)
            if self.schedule_of(p) == SCHEDULE:
                table = self.model_wrap.sigmas
                timesteps = denoise_timesteps(steps or p.steps, p.denoising_strength, denoise_mode(p), len(table))
                if not timesteps:
                    p.comment(
                        f"SUN: denoising strength {p.denoising_strength:g} leaves none of {steps or p.steps} steps to "
                        f"run, so the picture comes back as it was. Use {math.ceil(100 / (steps or p.steps)) / 100:g} "
                        "or more, or more steps."
                    )
                    return x
                # Asked for exactly this many steps, the host runs the last of its schedule.
                self.img2img_sigmas, steps = sigmas_at(table, timesteps), len(timesteps)
            try:
                return super().sample_img2img(
                    p, x, noise, conditioning, unconditional, steps=steps, image_conditioning=image_conditioning
                )
            finally:
                self.img2img_sigmas = None

        def schedule_of(self, p: Any) -> str | None:
            """Internal name of the schedule this pass runs on."""
            chosen = (p.hr_scheduler if p.is_hr_pass else p.scheduler) or "Automatic"
            if chosen == "Automatic":
                return self.config.options.get("scheduler")
            found = sd_schedulers.schedulers_map.get(chosen)
            return found.name if found else None

    return SunSampler
