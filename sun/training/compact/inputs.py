"""What a compact U-Net is trained on: noised pictures, or what the teacher itself draws of captions."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...common.reading import ReadError, read_text
from ...common.settings import ConfigError
from ...common.worlds import EMOJI, find
from ...pipelines.schedulers import make_scheduler
from ..algorithm import NoiseSchedule, add_noise
from ..data.negative_phrases import NegativePrompts
from ..data.sources import Source
from ..student import Teacher
from .settings import CompactTrainConfig

Encode = Callable[[list[str]], Tensor]


@dataclass
class Batch:
    """Inputs x [B, 4, h, w] at t [B] with text states [B, L, D]; noise: what was added to them, where it is known."""

    x: Tensor
    t: Tensor
    text: Tensor
    noise: Tensor | None


class Captions:
    """Captions without pictures: those of a text file, or of random emoji scenes."""

    def __init__(self, source: str, rng: random.Random) -> None:
        self.rng = rng
        if source == EMOJI:
            made = find(EMOJI, "prompts")
            self.draw: Callable[[int], list[str]] = lambda count: list(made(count, rng))
            return
        if not Path(source).exists():
            raise FileNotFoundError(f"no captions at {source}: give a text file with one a line, or emoji.")
        try:
            lines = [line.strip() for line in read_text(source).split("\n") if line.strip()]
        except ReadError as error:
            raise ConfigError(str(error)) from error
        if not lines:
            raise ConfigError(f"{source} has no caption. Write one a line.")
        self.draw = lambda count: [rng.choice(lines) for _ in range(count)]


class NoisedPictures:
    """Pictures of a source, noised to random timesteps."""

    def __init__(
        self, config: CompactTrainConfig, source: Source, encode: Encode, schedule: NoiseSchedule, rng: random.Random
    ) -> None:
        self.config, self.source, self.schedule, self.rng = config, source, schedule, rng
        self.encode = source.encoder(encode)

    def __call__(self, step: int) -> Batch:
        x0, captions = self.source(self.config.run.batch_size)
        captions = ["" if self.rng.random() < self.config.empty_captions else c for c in captions]
        return noised(x0, self.encode(captions), self.schedule, self.rng)


def noised(x0: Tensor, text: Tensor, schedule: NoiseSchedule, rng: random.Random) -> Batch:
    """Latents x0 [B, 4, h, w] at timesteps drawn evenly from 0..T-1."""
    t = torch.tensor([rng.randrange(schedule.num_train_timesteps) for _ in range(len(x0))], device=x0.device)
    noise = torch.randn_like(x0)
    return Batch(add_noise(x0, noise, t, schedule), t, text, noise)


class TeacherBank:
    """Pictures the teacher drew with guidance, with the states it went through; part of a run's checkpoints.

    shape: of one latent (4, h, w). The bank grows by a batch every ``target_reuse`` steps and keeps the newest
    ``bank_size``.
    """

    def __init__(
        self,
        config: CompactTrainConfig,
        teacher: Teacher,
        captions: Captions,
        negatives: NegativePrompts,
        encode: Encode,
        schedule: NoiseSchedule,
        scheduler_config: Any,
        shape: tuple[int, int, int],
        device: torch.device,
        rng: random.Random,
    ) -> None:
        self.config, self.teacher, self.captions, self.negatives = config, teacher, captions, negatives
        self.encode, self.schedule, self.shape, self.device, self.rng = encode, schedule, shape, device, rng
        self.scheduler = make_scheduler(config.teacher_solver, scheduler_config)
        self.scheduler.set_timesteps(config.teacher_steps, device=device)
        self.times = [int(t) for t in self.scheduler.timesteps]
        self.rows: deque[tuple[Tensor, str, str]] = deque(maxlen=config.bank_size)
        """(states [S + 1, 4, h, w], the last one clean; positive text; negative text)"""

    def __call__(self, step: int) -> Batch:
        count = self.config.run.batch_size
        if not self.rows or step % self.config.target_reuse == 0:
            self._grow(count)
        rows = [self.rows[self.rng.randrange(len(self.rows))] for _ in range(count)]
        if self.config.inputs == "noised":
            texts = ["" if self.rng.random() < self.config.empty_captions else row[1] for row in rows]
            x0 = torch.stack([row[0][-1] for row in rows]).to(self.device)
            return noised(x0, self.encode(texts), self.schedule, self.rng)
        places = [self.rng.randrange(len(self.times)) for _ in rows]
        x = torch.stack([row[0][k] for row, k in zip(rows, places, strict=True)]).to(self.device)
        # guidance calls the U-Net with both texts
        texts = [row[1] if self.rng.random() < 0.5 else row[2] for row in rows]
        return Batch(x, torch.tensor([self.times[k] for k in places], device=self.device), self.encode(texts), None)

    @torch.no_grad()
    def _grow(self, count: int) -> None:
        positives = self.captions.draw(count)
        negatives = [self.negatives.draw(self.rng) for _ in positives]
        positive, negative = self.encode(positives), self.encode(negatives)
        x = torch.randn(count, *self.shape, device=self.device)
        self.scheduler.set_timesteps(self.config.teacher_steps, device=self.device)  # forgets the last run's history
        states = [x]
        for t in self.scheduler.timesteps:
            predicted = self.teacher(x, t.expand(count), positive, negative)
            x = self.scheduler.step(predicted, t, x, return_dict=False)[0]
            states.append(x)
        self.rows.extend(zip(torch.stack(states, 1).cpu().unbind(0), positives, negatives, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [[states.clone(), positive, negative] for states, positive, negative in self.rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for rows of other times or sizes."""
        rows = []
        for states, positive, negative in state["rows"]:
            if tuple(states.shape) != (len(self.times) + 1, *self.shape):
                raise ValueError(f"a picture of the teacher with states {tuple(states.shape)}")
            if not isinstance(positive, str) or not isinstance(negative, str):
                raise ValueError("a picture of the teacher without its texts")
            rows.append((states, positive, negative))
        self.rows.clear()
        self.rows.extend(rows)
