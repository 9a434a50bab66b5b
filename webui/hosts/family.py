"""Which family of hosts runs us. Asked of the loaded model at run time: names and versions change, this does not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from ..run import WebuiRun
from . import a1111, forge


class Host(Protocol):
    """What differs between the families; `a1111` and `forge` are the two modules that have it."""

    def unet_of(self, sd_model: Any) -> torch.nn.Module:
        """The U-Net in LDM layout."""

    def prediction_of(self, sd_model: Any) -> str:
        """What the model predicts, by diffusers' names ("epsilon")."""

    def sigma_at(self, sd_model: Any) -> Callable[[float], float] | None:
        """What gives the noise level at a share of the way from noise to picture, where ControlNets go by it."""

    def sampling(self, run: WebuiRun, p: Any) -> AbstractContextManager[None]:
        """Hangs SUN on the model while one sampling runs, and takes it off whatever happens."""

    def kept_beside(self, p: Any, unet: torch.nn.Module) -> AbstractContextManager[None]:
        """Has another U-Net where the loaded one is, while one sampling runs."""

    def patches_weights(self, sd_model: Any) -> bool:
        """Whether weights of the loaded U-Net alone are changed for this run (LoRAs)."""

    def before_step(self, run: WebuiRun, params: Any) -> None:
        """Prepares a step, from the host's CFG denoiser callback."""

    def after_step(self, run: WebuiRun, params: Any) -> None:
        """Ends a step, before the host combines its predictions."""


def of(sd_model: Any) -> Host:
    """Forge, reForge and Forge Classic keep their model in `forge_objects`; A1111 and its forks have none."""
    return forge if hasattr(sd_model, "forge_objects") else a1111
