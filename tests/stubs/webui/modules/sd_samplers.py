"""The list of samplers. The last entry of a name wins in the map; the list is what the dropdowns show."""

from __future__ import annotations

import functools
from typing import Any

from . import sd_samplers_common, sd_samplers_kdiffusion, sd_samplers_timesteps

K_DIFFUSION = (
    ("DPM++ 2M", "sample_dpmpp_2m", {}), ("Euler", "sample_euler", {}), ("Euler a", "sample_euler_ancestral", {}),
    ("Heun", "sample_heun", {"second_order": True}), ("DPM2", "sample_dpm_2", {"second_order": True}),
    ("DPM fast", "sample_dpm_fast", {}),
)  # fmt: skip
all_samplers = [
    *(
        sd_samplers_common.SamplerData(
            label,
            lambda model, name=name: sd_samplers_kdiffusion.KDiffusionSampler(name, model),
            [],
            {"scheduler": "simple", **options},
        )
        for label, name, options in K_DIFFUSION
    ),
    *(
        sd_samplers_common.SamplerData(
            label, lambda model, f=function: sd_samplers_timesteps.CompVisSampler(f, model), [], {}
        )
        for label, function in (
            ("DDIM", sd_samplers_timesteps.ddim),
            ("PLMS", sd_samplers_timesteps.plms),
            ("UniPC", sd_samplers_timesteps.unipc),
        )
    ),
]
all_samplers_map = {x.name: x for x in all_samplers}
samplers: list[Any] = []
samplers_map: dict[str, str] = {}


def set_samplers() -> None:
    samplers[:] = all_samplers
    samplers_map.update({sampler.name.lower(): sampler.name for sampler in all_samplers})


def find_sampler_config(name: str | None) -> Any:
    return all_samplers_map.get(name) if name is not None else all_samplers[0]


@functools.cache
def get_sampler_and_scheduler(name: str | None, scheduler: str | None) -> tuple[str, str]:
    """Unknown names fall back to the first sampler; asked once, remembered."""
    return all_samplers_map.get(name, all_samplers[0]).name, scheduler or "Automatic"


def create_sampler(name: str, model: Any) -> Any:
    config = find_sampler_config(name)
    assert config is not None, f"bad sampler name: {name}"
    sampler = config.constructor(model)
    sampler.config = config
    return sampler


set_samplers()
