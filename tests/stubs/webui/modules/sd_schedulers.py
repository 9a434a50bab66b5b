"""The list of schedules; one with need_inner_model gets the denoiser, whose `sigmas` is the table of all timesteps."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass
class Scheduler:
    name: str
    label: str
    function: Any
    default_rho: float = -1
    need_inner_model: bool = False
    aliases: Any = None


def simple(n: int, sigma_min: float, sigma_max: float, inner_model: Any, device: Any) -> torch.Tensor:
    stride = len(inner_model.sigmas) / n
    return torch.tensor([float(inner_model.sigmas[-(1 + int(i * stride))]) for i in range(n)] + [0.0])


schedulers = [Scheduler("automatic", "Automatic", None), Scheduler("simple", "Simple", simple, need_inner_model=True)]
schedulers_map = {**{x.name: x for x in schedulers}, **{x.label: x for x in schedulers}}
