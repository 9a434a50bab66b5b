"""The trained timesteps in the host: sampler "SUN", schedule "SUN Trailing", and any other sampler kept to them.

The sampler is the host's Euler (DDIM with eta 0 in its space, Eq. 9) with three differences: it starts from the noise
diffusers starts from, uses the trained timesteps for image to image, and does nothing where nothing is to be done.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from modules import sd_samplers, sd_samplers_common, sd_samplers_kdiffusion, shared

from ..sun.schedule import denoise_timesteps, trailing_timesteps

log = logging.getLogger(__name__)

SAMPLER = "SUN"
SCHEDULE = "sun_trailing"
SCHEDULE_LABEL = "SUN Trailing"


@contextmanager
def function_replaced(p: Any, around: Callable[..., torch.Tensor], unknown: Exception) -> Iterator[None]:
    """While p.sampler samples, its function is `around(function, given, denoiser, *args, **kwargs)`.

    given: all arguments by name. Only what this one sampler object holds is replaced. Raises `unknown` for a sampler
    that has no function.
    """
    sampler = p.sampler
    function = getattr(sampler, "func", None)
    if not callable(function):
        raise unknown

    @functools.wraps(function)  # hosts ask it for its parameters
    def replaced(denoiser: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = inspect.signature(function).bind(denoiser, *args, **kwargs).arguments
        return around(function, given, denoiser, *args, **kwargs)

    sampler.func = replaced
    try:
        yield
    finally:
        if sampler.func is replaced:
            sampler.func = function


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


def host_schedules() -> Any:
    """The host's module of schedules; None in Forge Classic, where each sampler has its own."""
    try:
        return importlib.import_module("modules.sd_schedulers")
    except ImportError:
        return None


def register() -> None:
    """Adds both to the host's lists, in the place of an earlier registration ("Reload UI" runs this again)."""
    schedules = host_schedules()
    if schedules is not None:
        scheduler = schedules.Scheduler(SCHEDULE, SCHEDULE_LABEL, trailing_sigmas, need_inner_model=True)
        _put(schedules.schedulers, scheduler)
        schedules.schedulers_map.update({SCHEDULE: scheduler, SCHEDULE_LABEL: scheduler})

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
        if text not in p.comments:
            log.warning(text)
        p.comment(text)


TIMESTEP_SAMPLERS = ("ddim", "ddim_cfgpp", "plms")
"""Of the host's samplers that walk timesteps instead of sigmas, those that walk the ones they are given."""


def keep_to_trained(sampler: Any, p: Any) -> None:
    """Makes this one sampler object run on the trained timesteps, in image to image on those that `denoise_mode` says.

    Three of its methods are answered for it; it is dropped with its run, and the host's classes stay as they are.
    Raises ValueError for a sampler that chooses its timesteps itself.
    """
    if not isinstance(getattr(sampler, "sun_trained", None), TrainedTimesteps):
        sampler.sun_trained = TrainedTimesteps(sampler, p)


class TrainedTimesteps:
    """What a sampler of the host is told when it asks which noise levels to visit."""

    def __init__(self, sampler: Any, p: Any) -> None:
        function = getattr(sampler, "func", None)
        parameters = inspect.signature(function).parameters if callable(function) else {}
        self.sampler, self.image_to_image = sampler, sampler.sample_img2img
        self.wanted: list[int] | None = None
        """The timesteps of an image-to-image run, from noisy to clean."""
        table = getattr(sampler.model_wrap, "sigmas", None)
        if "sigmas" in parameters and table is not None and len(table) >= 1000:  # LCM keeps 50 of the model's
            sampler.get_sigmas, self.walks_timesteps = self.sigmas, False
        elif "timesteps" in parameters and getattr(function, "__name__", "") in TIMESTEP_SAMPLERS:
            sampler.get_timesteps, self.walks_timesteps = self.timesteps, True
        else:
            raise ValueError(
                f"SUN: the sampler {p.sampler_name} chooses its timesteps itself, so it cannot run on SUN's. Choose "
                "another sampler, SUN's own, or to keep the page's schedule."
            )
        sampler.sample_img2img = self.sample_img2img

    def sigmas(self, _p: Any, steps: int) -> torch.Tensor:
        """In the place of `get_sigmas`: [steps + 1], ending at 0."""
        table = self.sampler.model_wrap.sigmas
        if self.wanted is None:
            return trailing_sigmas(steps, 0.0, 0.0, self.sampler.model_wrap, "cpu")
        # The caller takes the end of a longer schedule; what stands before it is never used.
        wanted = sigmas_at(table, self.wanted)
        return torch.cat([wanted.new_zeros(max(steps + 1 - len(wanted), 0)), wanted])

    def timesteps(self, _p: Any, steps: int) -> torch.Tensor:
        """In the place of `get_timesteps`: ascending from 0, where the last step ends.

        The host leaves out the last of them in image to image, having made the noise for it; so it stands there twice.
        """
        descending = trailing_timesteps(steps, 1000) if self.wanted is None else self.wanted
        return torch.tensor([0, *reversed(descending), *([] if self.wanted is None else descending[:1])])

    def sample_img2img(
        self,
        p: Any,
        x: torch.Tensor,
        noise: torch.Tensor,
        conditioning: Any,
        unconditional: Any,
        steps: int | None = None,
        image_conditioning: Any = None,
    ) -> torch.Tensor:
        """In the place of the method of that name. x: start latents [B, 4, H, W]."""
        asked = int(steps or p.steps)
        self.wanted = denoise_timesteps(asked, p.denoising_strength, denoise_mode(p), 1000)
        try:
            if not self.wanted:
                least = f"{math.ceil(100 / asked) / 100:g} or more, or more steps"
                p.comment(
                    f"SUN: denoising strength {p.denoising_strength:g} leaves none of {asked} steps to run, so the "
                    f"picture comes back as it was. Use {least if denoise_mode(p) == 'trained' else 'more than 0'}."
                )
                return x
            # Asked for exactly this many steps, the host runs the last of its schedule.
            count = len(self.wanted) + 2 * self.walks_timesteps
            return self.image_to_image(
                p, x, noise, conditioning, unconditional, steps=count, image_conditioning=image_conditioning
            )
        finally:
            self.wanted = None


@functools.cache
def sampler_class() -> type:
    """The sampler, made from the host's own class when it is first needed."""

    class SunSampler(sd_samplers_kdiffusion.KDiffusionSampler):
        """Euler on the trained timesteps."""

        def __init__(self, sd_model: Any) -> None:
            super().__init__("sample_euler", sd_model)

        def sample(self, p: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            """x: noise [B, 4, H, W]. The host scales it by sigma; the trajectory begins at sqrt(1 + sigma^2)."""
            self.begin(p)
            if not getattr(shared.opts, "sgm_noise_multiplier", False):
                first = float(self.get_sigmas(p, kwargs.get("steps") or p.steps)[0])
                x = x * (math.sqrt(1.0 + first**2) / first)
            return super().sample(p, x, *args, **kwargs)

        def sample_img2img(self, p: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.begin(p):
                return self.sample_img2img(p, x, *args, **kwargs)  # now that of TrainedTimesteps
            return super().sample_img2img(p, x, *args, **kwargs)

        def begin(self, p: Any) -> bool:
            """Whether the trained timesteps were put in now; they are not where another schedule is chosen."""
            say_if_bare(p)
            if hasattr(self, "sun_trained") or self.schedule_of(p) != SCHEDULE:
                return False
            keep_to_trained(self, p)
            return True

        def schedule_of(self, p: Any) -> str | None:
            """Internal name of the schedule this pass runs on."""
            hires = getattr(p, "is_hr_pass", False)
            chosen = getattr(p, "hr_scheduler" if hires else "scheduler", None) or "Automatic"
            schedules = host_schedules()
            if chosen == "Automatic" or schedules is None:
                return SCHEDULE
            found = schedules.schedulers_map.get(chosen)
            return found.name if found else None

    return SunSampler
