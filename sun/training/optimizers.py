"""The optimisers a run may use; all are AdamW, which the paper trains with."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..common.settings import ConfigError

if TYPE_CHECKING:
    from .config import RunConfig


def make_optimizer(
    config: RunConfig, parameters: Iterable[torch.nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """AdamW as ``config.optimizer`` says.

    ``adamw``: torch's own. ``fused``: the same numbers in one kernel a step, for CUDA, MPS and CPU. ``8bit``:
    bitsandbytes, whose state takes 2 bytes a parameter instead of 8 (Dettmers et al. 2022, arXiv 2110.02861).

    Raises ConfigError when the choice cannot run here, saying what to install or choose.
    """
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "8bit":
        return _adamw_8bit(list(parameters), device, settings)
    if config.optimizer == "fused" and "fused" in inspect.signature(torch.optim.AdamW).parameters:
        try:
            return torch.optim.AdamW(parameters, fused=True, **settings)
        except RuntimeError as error:
            raise ConfigError(f"optimizer fused does not run on {device}: {error}. Use optimizer = adamw.") from error
    return torch.optim.AdamW(parameters, **settings)


def _adamw_8bit(
    parameters: list[torch.nn.Parameter], device: torch.device, settings: dict[str, Any]
) -> torch.optim.Optimizer:
    if device.type == "cpu":
        raise ConfigError("optimizer 8bit needs an accelerator, and this run is on the CPU. Use adamw or fused.")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            'optimizer 8bit needs bitsandbytes: pip install -e ".[low-memory]" in a clone of the repository '
            f"(or choose optimizer = fused). The import said: {error}"
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **settings)
    return optimizer
