"""Switching as a method: ``switch[NAME,share=0.4]-25``, two U-Nets that take turns by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..common.settings import ConfigError
from ..switching import LARGE_FIRST, SMALL_FIRST, Border, Switching, SwitchingError, check_pair
from ..switching.pipelines import traits_of
from .names import MethodCall


class SwitchedUNet(nn.Module):
    """Two U-Nets as one, which is told of every run's scheduler."""

    def __init__(self, large: Any, small: Any, switching: Switching) -> None:
        super().__init__()
        self.large, self.small, self.switching = large, small, switching
        self.dtype = large.dtype
        self._scheduler: Any = None
        self._border: Border | None = None

    def begin(self, scheduler: Any) -> None:
        """A run begins: its steps are those of the scheduler from the first that is asked for."""
        self._scheduler, self._border = scheduler, None

    def forward(self, x: torch.Tensor, t: Any, text: torch.Tensor) -> Any:
        """As of a diffusers U-Net: x [B, 4, h, w], a timestep, text states [B, L, D]."""
        time = float(t)
        if self._border is None:
            left = [other for other in map(float, self._scheduler.timesteps) if other <= time]
            self._border = self.switching.border(left or [time])
        return (self.small if self._border.small(time) else self.large)(x, t, text)


def switched(large: Any, small: Any, call: MethodCall) -> SwitchedUNet:
    """The pair of a method's call. Raises ConfigError for U-Nets that cannot take turns."""
    try:
        check_pair(traits_of(large, None), traits_of(small, None))
        return SwitchedUNet(large, small, switching_of(call))
    except SwitchingError as error:
        raise ConfigError(f"{call.text}: {error}") from error


def switching_of(call: MethodCall) -> Switching:
    """Share and order of a method's call; ``large_first=1`` is the other order. Raises SwitchingError."""
    order = LARGE_FIRST if call.number("large_first", 0) else SMALL_FIRST
    return Switching(call.number("share", 0.4), order)
