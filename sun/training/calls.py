"""What a training costs in U-Net calls, so that methods can be compared at one budget.

A call is one picture through the U-Net: 1 for the forward pass and 2 more where a backward pass follows. The teacher's
calls count as well, two a picture under classifier-free guidance; pictures drawn to look at do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

FORWARD, BACKWARD = 1, 2


class UNetCalls:
    """Counts the calls of the U-Nets it watches, since :meth:`begin`."""

    def __init__(self) -> None:
        self.watched = 0
        self._count = 0

    def watch(self, unet: nn.Module) -> None:
        """Count every call of ``unet`` (sample [B, C, H, W], ...) from now on."""
        self.watched += 1
        unet.register_forward_hook(self._add, with_kwargs=True)

    def begin(self) -> None:
        self._count = 0

    def take(self) -> int:
        """The calls since :meth:`begin` or the last ``take``."""
        count, self._count = self._count, 0
        return count

    def _add(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        rows = len(args[0] if args else kwargs["sample"])
        noise = output[0] if isinstance(output, tuple) else output.sample
        trains = torch.is_grad_enabled() and noise.requires_grad
        self._count += rows * (FORWARD + (BACKWARD if trains else 0))
