"""The negative prompt as text states, encoded through the host's own parser and cache.

The host itself skips it at CFG 1 (Forge does not even encode it), so its result is not there to be borrowed.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from modules import prompt_parser, sd_samplers, shared

from .choices import SunSettings

MARK = 1024.0
_caches: weakref.WeakKeyDictionary[Any, dict[bool, list[Any]]] = weakref.WeakKeyDictionary()
"""By the loaded model: Forge makes another with another text encoder, which the key of its own cache does not tell."""


def texts(p: Any, settings: SunSettings, hires: bool = False) -> list[str]:
    """The negative prompt of each image of the current batch."""
    if not settings.main_negative:
        return [settings.negative] * len(p.prompts)
    chosen = p.hr_negative_prompts if hires else p.negative_prompts
    return list(chosen if chosen is not None else p.negative_prompts)


def encode(p: Any, settings: SunSettings, hires: bool = False) -> Any:
    """Schedules of the negative prompts of the current batch, as the host's prompt parser makes them.

    LoRA on the text encoder, textual inversion, attention weights and prompt editing act as in the host's own box.
    """
    width, height = (p.hr_upscale_to_x, p.hr_upscale_to_y) if hires else (p.width, p.height)
    prompts = prompt_parser.SdConditioning(
        texts(p, settings, hires), is_negative_prompt=True, width=width, height=height
    )
    steps = _total_steps(p.sampler_name, p.steps)
    network = p.hr_extra_network_data if hires else p.extra_network_data
    cache = _caches.setdefault(p.sd_model, {}).setdefault(hires, [None, None])
    more: tuple[int, ...] = ()
    if hires:
        more = (_total_steps(p.hr_sampler_name or p.sampler_name, p.hr_second_pass_steps or p.steps),)
    encoded = p.get_conds_with_caching(prompt_parser.get_learned_conditioning, prompts, steps, [cache], network, *more)
    if not getattr(shared.opts, "persistent_cond_cache", True):
        _caches.clear()
    return encoded


def at_step(schedules: Any, step: int) -> torch.Tensor:
    """Text states [B, L, width] in force at a step of the sampler."""
    states = prompt_parser.reconstruct_cond_batch(schedules, step)
    if isinstance(states, dict):
        raise ValueError("SUN works on Stable Diffusion 1.x models, and this one has two texts. Choose an SD 1.5 one.")
    return without_marks(states)


def without_marks(states: torch.Tensor) -> torch.Tensor:
    """Text states without the row of +-1024 that ControlNet for A1111 puts before every text and takes off itself."""
    if states.shape[1] > 1 and bool(((states[:, 0].float().abs() - MARK).abs() < 1e-3).all()):
        return states[:, 1:]
    return states


def _total_steps(sampler: str, steps: int) -> int:
    """Steps as prompt editing counts them: second-order samplers count twice."""
    config = sd_samplers.find_sampler_config(sampler)
    return config.total_steps(steps) if config else steps
