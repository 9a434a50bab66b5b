"""SamplerData, the count of img2img steps, and Sampler.launch_sampling, which ends an interrupted run quietly and looks
for the sampler's function only when it calls it."""

from __future__ import annotations

import inspect
from collections import namedtuple
from typing import Any

from .shared import opts, state


class SamplerData(namedtuple("SamplerData", ["name", "constructor", "aliases", "options"])):
    def total_steps(self, steps: int) -> int:
        return steps * 2 if self.options.get("second_order", False) else steps


class InterruptedException(BaseException):
    pass


def setup_img2img_steps(p: Any, steps: int | None = None) -> tuple[int, int]:
    if opts.img2img_fix_steps or steps is not None:
        requested = steps or p.steps
        return int(requested / min(p.denoising_strength, 0.999)) if p.denoising_strength > 0 else 0, requested - 1
    return p.steps, int(min(p.denoising_strength, 0.999) * p.steps)


class Sampler:
    def __init__(self) -> None:
        self.config: Any = None
        self.last_latent: Any = None
        self.sampler_extra_args: dict[str, Any] = {}

    def initialize(self, p: Any, x: Any, cond: Any, uncond: Any, image_cond: Any) -> dict[str, Any]:
        """Makes ready for a run; what the page and the settings say beside, for the function's own parameters."""
        self.model_wrap_cfg.begin(p)
        self.last_latent = x
        self.sampler_extra_args = {
            "cond": cond, "uncond": uncond, "cond_scale": p.cfg_scale, "s_min_uncond": p.s_min_uncond,
            "image_cond": image_cond,
        }  # fmt: skip
        known = inspect.signature(self.func).parameters
        return {name: value for name in ("s_churn", "eta") if name in known and (value := getattr(p, name)) is not None}

    def launch_sampling(self, steps: int, func: Any) -> Any:
        self.model_wrap_cfg.steps = steps
        self.model_wrap_cfg.total_steps = self.config.total_steps(steps)
        state.sampling_steps, state.sampling_step = steps, 0
        try:
            return func()
        except InterruptedException:
            return self.last_latent
