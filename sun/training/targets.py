"""What a step of SUN training aims at: Algorithm 1 on noised data, or the teacher's own guided trajectories."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .algorithm import NoiseSchedule, StageTargets, add_noise, pseudo_huber, stage_targets, state_gain
from .data.negative_phrases import NegativePrompts
from .data.sources import Source
from .replay import Batch, ReplayBuffer
from .run import TrainingRun
from .trajectories import TrajectoryBank, run_teacher

if TYPE_CHECKING:
    from .config import SunTrainConfig
    from .student import Teacher

RowsModel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [R, 4, h, w], t [R], rows [R] of the batch) -> predicted noise."""


def draw_timesteps(config: SunTrainConfig, count: int, total: int, generator: random.Random) -> Tensor:
    """Timesteps 0..T-1: uniform, or with ``stage_start_probability`` one of the stage starts (999, 749, 499, 249)."""
    stage = round(config.stage_length * total)
    starts = list(range(total - 1, 0, -stage))
    drawn = [
        generator.choice(starts) if generator.random() < config.stage_start_probability else generator.randrange(total)
        for _ in range(count)
    ]
    return torch.tensor(drawn)


def start_timesteps(config: SunTrainConfig, t: Tensor, total: int, generator: random.Random) -> Tensor:
    """Where each row begins: ``t``, or with probability p one stage earlier where there is an earlier stage."""
    stage = round(config.stage_length * total)
    replaced = torch.tensor([generator.random() < config.replace_probability for _ in range(len(t))]) & (
        t + stage < total
    )
    return torch.where(replaced, t + stage, t)


@torch.no_grad()
def noised_stage(
    config: SunTrainConfig,
    x0: Tensor,
    teacher: RowsModel,
    student: RowsModel,
    schedule: NoiseSchedule,
    rng: random.Random,
) -> StageTargets:
    """Stage targets of a batch of latents ``x0`` [B, 4, h, w], noised to random timesteps (Algorithm 1)."""
    total = schedule.num_train_timesteps
    t = draw_timesteps(config, len(x0), total, rng)
    start = start_timesteps(config, t, total, rng).to(x0.device)
    noise = torch.randn_like(x0)
    x_start = add_noise(x0, noise, start, schedule)
    if config.pure_noise_at_start:
        x_start = torch.where((start == total - 1).view(-1, 1, 1, 1), noise, x_start)
    stage = round(config.stage_length * total)
    return stage_targets(x_start, start, t.to(x0.device), stage, config.substeps, teacher, student, schedule)


def row_errors(predicted: Tensor, target: Tensor, huber_c: float = 0.0) -> Tensor:
    """Mean error [B] of every row: the squared one, or 2c times pseudo-Huber, which is nearly that for differences well
    below ``huber_c`` and grows linearly above it."""
    difference = predicted - target
    error = 2 * huber_c * pseudo_huber(difference, huber_c) if huber_c else difference.square()
    return error.flatten(1).mean(1)


def sun_losses(predicted: Tensor, targets: StageTargets) -> tuple[Tensor, Tensor]:
    """(L_cfg, L_msc), both at the same input x_t (Eq. 8 and 11)."""
    return row_errors(predicted, targets.e_cfg).mean(), row_errors(predicted, targets.e_step).mean()


def state_weights(config: SunTrainConfig, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Weights [B] that turn the error of a stage's noise into the error of the state it leads to, times a constant:
    their mean over the stages' starts is 1."""
    stage = round(config.stage_length * schedule.num_train_timesteps)
    starts = torch.arange(schedule.num_train_timesteps - 1, -1, -stage, device=t.device)
    gains, own = (state_gain(k, (k - stage).clamp_min(-1), schedule).square() for k in (starts, t))
    return own / gains.mean()


def weighted(
    config: SunTrainConfig,
    student: Any,
    targets: StageTargets,
    positive: Tensor,
    negative: Tensor,
    schedule: NoiseSchedule,
) -> dict[str, Tensor]:
    """``total`` = cfg_weight L_cfg + lambda L_msc, with the errors ``config`` asks for; and both as published.

    With ``negative_weight``, L_msc of what a negative changes is added: the rows are pairs that differ in the negative
    alone, and of each the difference of the predictions is held against that of the targets.
    """
    w = targets.w if len(targets.w) else None
    predicted = student(targets.x_t, targets.t, positive, negative, w)
    weights = state_weights(config, targets.t, schedule) if config.msc_error == "state" else torch.ones_like(targets.t)
    errors = weights * row_errors(predicted, targets.e_step, config.huber_c)
    total = config.cfg_weight * row_errors(predicted, targets.e_cfg, config.huber_c).mean()
    total = total + config.msc_weight * errors.mean()
    found = {}
    if config.negative_weight:
        change, goal = (part[0::2] - part[1::2] for part in (predicted, targets.e_step))
        changed = (weights[0::2] * row_errors(change, goal, config.huber_c)).mean()
        total = total + config.msc_weight * config.negative_weight * changed
        found["negative"] = changed.detach()
    with torch.no_grad():
        cfg, msc = sun_losses(predicted, targets)
    return {"total": total, "cfg": cfg, "msc": msc, **found}


def draw_guidance(config: SunTrainConfig, count: int, generator: random.Random) -> Tensor:
    """Guidance scales [count] of the rows, evenly spread in their logarithm; empty unless there is a range."""
    low, high = config.guidance_range
    if not low:
        return torch.empty(0)
    return torch.tensor([math.exp(generator.uniform(math.log(low), math.log(high))) for _ in range(count)])


def rows_of(w: Tensor, rows: Tensor) -> Tensor | None:
    """The guidance scales of some rows; None where the adapter has its own."""
    return w[rows] if len(w) else None


@dataclass
class Prompts:
    """Captions of the data with random negatives; ``encode`` gives text states [B, L, D]."""

    source: Source
    negatives: NegativePrompts
    rng: random.Random
    encode: Callable[[list[str]], Tensor]
    empty_captions: float
    batch_size: int

    def draw(self) -> tuple[Tensor, list[str], list[str]]:
        """(latents [B, 4, h, w], captions, negatives)."""
        x0, captions = self.source(self.batch_size)
        captions = ["" if self.rng.random() < self.empty_captions else c for c in captions]
        return x0, captions, [self.negatives.draw(self.rng) for _ in captions]


class NoisedData:
    """The paper's Algorithm 1: inputs are noised data."""

    def __init__(
        self, config: SunTrainConfig, run: TrainingRun, prompts: Prompts, teacher: Teacher, schedule: NoiseSchedule
    ):
        self.config, self.rng, self.prompts, self.teacher, self.schedule = config, run.rng, prompts, teacher, schedule
        self.student = run.modules["student"]
        size = 16 if config.target_reuse > 1 else 1
        self.recent = run.track("replay", ReplayBuffer(size, run.accelerator.device))

    @torch.no_grad()
    def _new(self) -> Batch:
        x0, captions, negatives = self.prompts.draw()
        positive, negative = self.prompts.encode(captions), self.prompts.encode(negatives)
        w = draw_guidance(self.config, len(x0), self.rng).to(x0.device)
        targets = noised_stage(
            self.config,
            x0,
            lambda x, k, rows: self.teacher(x, k, positive[rows], negative[rows], rows_of(w, rows)),
            lambda x, k, rows: self.student(x, k, positive[rows], negative[rows], rows_of(w, rows)),
            self.schedule,
            self.rng,
        )
        targets.w = w
        return targets, positive, negative

    def losses(self, step: int) -> dict[str, Tensor]:
        """``total`` and its parts, for one batch."""
        fresh = not self.recent or step % self.config.target_reuse == 0
        batch = self.recent.add(self._new()) if fresh else self.recent.draw(self.rng)
        return weighted(self.config, self.student, *batch, self.schedule)


class GuidedTrajectories:
    """Inputs are states of the teacher's guided trajectories; see ``trajectories.py``.

    They begin at pure noise or, with ``picture_starts``, at the noised picture of another caption.
    """

    def __init__(
        self,
        config: SunTrainConfig,
        run: TrainingRun,
        prompts: Prompts,
        teacher: Teacher,
        schedule: NoiseSchedule,
        scheduler_config: Any,
        shape: tuple[int, int, int],
        name: str = "",
    ):
        self.config, self.rng, self.prompts, self.teacher = config, run.rng, prompts, teacher
        self.scheduler_config, self.shape, self.student = scheduler_config, shape, run.modules["student"]
        stages = round(1 / config.stage_length)
        self.group = 2 if config.negative_weight else 1
        self.bank = run.track(
            f"bank{name}",
            TrajectoryBank(
                config.bank_size,
                stages,
                schedule,
                run.rng,
                run.accelerator.device,
                1 if config.stage_start_probability == 1 else config.substeps,
                config.stage_start_probability,
                self.group,
            ),
        )

    def _grow(self) -> None:
        pictures, positives, negatives = self.prompts.draw()
        start, begin = torch.randn(len(positives), *self.shape, device=self.bank.device), 0
        w = draw_guidance(self.config, len(positives), self.rng).to(start.device)
        if self.config.picture_starts and self.rng.random() < self.config.picture_starts:
            begin = self.bank.draw_begin()
            at = self.bank.times[begin].expand(len(pictures))
            start = add_noise(pictures.roll(1, 0).to(start), start, at, self.bank.schedule)
        if self.group == 2:  # every second row is the one before it with another negative, or without one
            start, w = (part[0::2].repeat_interleave(2, 0) for part in (start, w))
            positives = [positives[i - i % 2] for i in range(len(positives))]
            negatives = [n if i % 2 == 0 or self.rng.random() < 0.5 else "" for i, n in enumerate(negatives)]
        every = torch.arange(len(positives), device=start.device)
        states, guided = run_teacher(
            lambda x, t, p, n: self.teacher(x, t, p, n, rows_of(w, every)),
            start,
            self.prompts.encode(positives),
            self.prompts.encode(negatives),
            self.bank.stages,
            self.config.substeps,
            self.config.teacher_solver,
            self.scheduler_config,
            self.config.substeps // self.bank.span,
            begin,
        )
        self.bank.add(states, guided, positives, negatives, w, begin)

    def losses(self, step: int) -> dict[str, Tensor]:
        """``total`` and its parts, for one batch."""
        config = self.config
        if not self.bank.rows or step % config.target_reuse == 0:
            self._grow()
        rows = self.bank.pick(config.run.batch_size)
        positive = self.prompts.encode([r.positive for r in rows])
        negative = self.prompts.encode([r.negative for r in rows])
        if self.rng.random() < config.rollout_probability:
            distance = self.bank.rollout(rows, self.student, positive, negative)
            return {"total": distance, "rollout": distance.detach()}
        targets = self.bank.stage_batch(
            rows,
            self.student,
            self.teacher,
            positive,
            negative,
            config.replace_probability,
            config.replace_depth,
            need_guided=config.cfg_weight > 0,
        )
        return weighted(config, self.student, targets, positive, negative, self.bank.schedule)


def make_objective(
    config: SunTrainConfig,
    run: TrainingRun,
    prompts: Prompts,
    teacher: Teacher,
    schedule: NoiseSchedule,
    scheduler_config: Any,
    shape: tuple[int, int, int],
    name: str = "",
) -> NoisedData | GuidedTrajectories:
    """What ``config`` trains on, for the module ``student`` of ``run``; ``shape`` is that of one latent,
    ``name`` tells several of a run apart."""
    if config.trajectories:
        return GuidedTrajectories(config, run, prompts, teacher, schedule, scheduler_config, shape, name)
    return NoisedData(config, run, prompts, teacher, schedule)
