"""The last teacher batches, drawn again by the student (``target_reuse``); part of a run's checkpoints."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .algorithm import StageTargets

Batch = tuple[StageTargets, Tensor, Tensor]
"""(targets, positive text states [B, L, D], negative text states [B, L, D])."""


class ReplayBuffer:
    """At most ``size`` batches, the newest last. ``device``: where restored batches go."""

    def __init__(self, size: int, device: torch.device):
        self._batches: deque[Batch] = deque(maxlen=size)
        self.device = device

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, batch: Batch) -> Batch:
        self._batches.append(batch)
        return batch

    def draw(self, rng: random.Random) -> Batch:
        return self._batches[rng.randrange(len(self._batches))]

    def state_dict(self) -> dict[str, Any]:
        return {
            "batches": [
                {f.name: getattr(targets, f.name) for f in fields(targets)} | {"positive": p, "negative": n}
                for targets, p, n in self._batches
            ]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for batches that are none."""
        batches = []
        for saved in state["batches"]:
            moved = {name: value.to(self.device) for name, value in saved.items()}
            positive, negative = moved.pop("positive"), moved.pop("negative")
            targets = StageTargets(**moved)
            same = targets.x_t.shape == targets.e_step.shape == targets.e_cfg.shape and targets.x_t.ndim == 4
            rows = {len(part) for part in (targets.x_t, targets.t, targets.replaced, positive, negative)}
            if not same or len(rows) != 1 or positive.shape != negative.shape or len(targets.w) not in (0, *rows):
                raise ValueError("a batch whose parts do not belong together")
            batches.append((targets, positive, negative))
        self._batches.clear()
        self._batches.extend(batches)
