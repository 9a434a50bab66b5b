"""How often a U-Net is asked, and for how many pictures."""

from __future__ import annotations

from typing import Any

import torch


class CallCounter:
    """Counts U-Net forwards and the rows (batch entries) they carried, through a forward pre-hook."""

    def __init__(self, unet: torch.nn.Module):
        self.calls, self.rows = 0, 0
        self._handle = unet.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        self.calls += 1
        self.rows += sample.shape[0]

    def __enter__(self) -> CallCounter:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
