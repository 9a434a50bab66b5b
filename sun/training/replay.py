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
        self._batches.clear()
        for saved in state["batches"]:
            moved = {name: value.to(self.device) for name, value in saved.items()}
            positive, negative = moved.pop("positive"), moved.pop("negative")
            self._batches.append((StageTargets(**moved), positive, negative))
