"""Stage targets on the teacher's own guided trajectories: the inputs that sampling really visits.

Algorithm 1 noises data; at inference the student starts from pure noise and follows the *guided* trajectory, which
leaves the data distribution. Here the teacher runs from pure noise to the end once, its states at the stage
boundaries are kept in a bank, and each of them serves as input and target many times. The teacher may be stepped
with DPM-Solver++, which is the reference that SUN is measured against. A trajectory may also begin later, at a noised
picture: that is where image to image and inpainting begin.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..pipelines.schedulers import make_scheduler
from ..schedule import trailing_timesteps
from .algorithm import NoiseSchedule, StageTargets, ddim_update, step_noise

Guided = Callable[..., Tensor]
"""(x [B, 4, h, w], t [B], positive, negative [B, 77, D], guidance scales [B] or None) -> predicted noise."""


@dataclass
class Trajectory:
    """One picture's path: ``states`` [S + 1, 4, h, w] at the kept times, ``guided`` [S, 4, h, w] the teacher's
    prediction at each of them but the last, the two prompts, the guidance scale (0: the adapter's own), and the first
    of the kept times that it visited: there is nothing in ``states`` and ``guided`` before ``begin``."""

    states: Tensor
    guided: Tensor
    positive: str
    negative: str
    w: float = 0.0
    begin: int = 0


@torch.no_grad()
def run_teacher(
    teacher: Guided,
    start: Tensor,
    positive: Tensor,
    negative: Tensor,
    stages: int,
    substeps: int,
    solver: str,
    scheduler_config: Mapping[str, Any],
    every: int | None = None,
    begin: int = 0,
) -> tuple[Tensor, Tensor]:
    """(states [B, S + 1, ...], guided [B, S, ...]) of ``stages`` x ``substeps`` steps of ``solver`` from ``start``.

    Every ``every``-th step is kept, by default the stage boundaries alone: S = stages x substeps / every. ``start``
    [B, 4, h, w] is pure noise, or a picture with the noise of the kept time ``begin``; what comes before that is 0.
    """
    every = every or substeps
    scheduler = make_scheduler(solver, scheduler_config)
    scheduler.set_timesteps(stages * substeps, device=start.device)
    if hasattr(scheduler, "set_begin_index"):  # DDIM has none and needs none
        scheduler.set_begin_index(begin * every)
    x, nothing = start, torch.zeros_like(start)
    states, guided = [nothing] * begin + [start], [nothing] * begin
    for i, t in list(enumerate(scheduler.timesteps))[begin * every :]:
        predicted = teacher(x, t.expand(len(x)), positive, negative).float()
        if i % every == 0:
            guided.append(predicted)
        x = scheduler.step(predicted, t, x, return_dict=False)[0]
        if (i + 1) % every == 0:
            states.append(x)
    return torch.stack(states, 1), torch.stack(guided, 1)


class TrajectoryBank:
    """The latest ``size`` trajectories; draws batches of (a time, the time one stage later) from them.

    ``span`` times are kept of each stage: 1 is its start alone. With more, a drawn time is a stage's start with
    ``start_probability``, else any of them, so that the student also learns the times of other step counts. Rows are
    added and drawn in groups of ``group`` that share their time: 2 for one noise and caption with two negatives.
    """

    def __init__(
        self,
        size: int,
        stages: int,
        schedule: NoiseSchedule,
        rng: random.Random,
        device: torch.device,
        span: int = 1,
        start_probability: float = 1.0,
        group: int = 1,
    ):
        self.rows: deque[Trajectory] = deque(maxlen=size // group * group)
        self.group = group
        self.schedule, self.rng, self.device = schedule, rng, device
        total = schedule.num_train_timesteps
        self.times = torch.tensor([*trailing_timesteps(stages * span, total), -1], device=device)
        self.stages, self.span, self.start_probability = stages, span, start_probability

    def add(
        self,
        states: Tensor,
        guided: Tensor,
        positives: list[str],
        negatives: list[str],
        w: Tensor | None = None,
        begin: int = 0,
    ) -> None:
        """``w`` [B] are guidance scales, where the adapter takes them; ``begin`` as in :func:`run_teacher`."""
        scales = w.tolist() if w is not None and len(w) else [0.0] * len(states)
        begins = [begin] * len(states)
        self.rows.extend(map(Trajectory, states.cpu(), guided.cpu(), positives, negatives, scales, begins))

    def pick(self, count: int) -> list[Trajectory]:
        """``count`` rows, a multiple of ``group``."""
        group = self.group
        drawn = [group * self.rng.randrange(len(self.rows) // group) for _ in range(count // group)]
        return [self.rows[first + i] for first in drawn for i in range(group)]

    def draw_begin(self) -> int:
        """A time that a noised picture may begin at: any but the first, where it would be pure noise."""
        return self.rng.randrange(1, self.stages * self.span)

    def _draw_time(self, begin: int) -> int:
        left = self.stages * self.span - begin
        if self.rng.random() < self.start_probability:
            return begin + self.span * self.rng.randrange(-(-left // self.span))
        return begin + self.rng.randrange(left)

    @torch.no_grad()
    def stage_batch(
        self,
        rows: list[Trajectory],
        student: Guided,
        teacher: Guided,
        positive: Tensor,
        negative: Tensor,
        replace_probability: float,
        replace_depth: int,
        need_guided: bool,
    ) -> StageTargets:
        """A random time of every row. With ``replace_probability`` its input is where the student itself arrives
        from up to ``replace_depth`` stages earlier; the target stays the teacher's next state (Eq. 12-13)."""
        span, last = self.span, len(self.times) - 1
        begin = torch.tensor([row.begin for row in rows])
        leaders = rows[:: self.group]
        place = torch.tensor([self._draw_time(row.begin) for row in leaders]).repeat_interleave(self.group)
        depth = torch.tensor(
            [
                self.rng.randint(1, replace_depth) if self.rng.random() < replace_probability else 0
                for _ in range(len(leaders))
            ]
        ).repeat_interleave(self.group)
        w = self._scales(rows)
        at = place - span * torch.minimum(depth, (place - begin) // span)  # where the student begins
        replaced = (at < place).to(self.device)
        x = torch.stack([r.states[k] for r, k in zip(rows, at.tolist(), strict=True)]).to(self.device)
        while (at < place).any():
            moving = (at < place).nonzero().flatten()
            now, then = (self.times[k.to(self.device)] for k in (at[moving], at[moving] + span))
            at[moving] += span
            moving = moving.to(self.device)
            noise = student(x[moving], now, positive[moving], negative[moving], None if w is None else w[moving])
            x[moving] = ddim_update(x[moving], noise, now, then, self.schedule)
        following = (place + span).clamp_max(last)
        goal = torch.stack([r.states[k] for r, k in zip(rows, following.tolist(), strict=True)]).to(self.device)
        guided = torch.stack([r.guided[k] for r, k in zip(rows, place.tolist(), strict=True)]).to(self.device)
        t, s = self.times[place.to(self.device)], self.times[following.to(self.device)]
        if need_guided and replaced.any():
            again = replaced.nonzero().flatten()
            guided[again] = teacher(
                x[again], t[again], positive[again], negative[again], None if w is None else w[again]
            )
        targets = StageTargets(x, t, step_noise(goal, x, t, s, self.schedule), guided, replaced)
        return targets if w is None else replace(targets, w=w)

    def _scales(self, rows: list[Trajectory]) -> Tensor | None:
        return torch.tensor([r.w for r in rows], device=self.device) if rows[0].w else None

    def rollout(self, rows: list[Trajectory], student: Guided, positive: Tensor, negative: Tensor) -> Tensor:
        """Mean squared distance of the student's last state to the teacher's, through all stages that are left."""
        x = torch.stack([r.states[r.begin] for r in rows]).to(self.device)
        w, last = self._scales(rows), len(self.times) - 1
        place = torch.tensor([r.begin for r in rows])
        while (place < last).any():
            following = (place + self.span).clamp_max(last)
            now, then = self.times[place.clamp_max(last - 1).to(self.device)], self.times[following.to(self.device)]
            moved = ddim_update(x, student(x, now, positive, negative, w), now, then, self.schedule)
            x = torch.where((place < last).view(-1, 1, 1, 1).to(self.device), moved, x)
            place = following
        goal = torch.stack([r.states[-1] for r in rows]).to(self.device)
        return (x - goal).square().mean()

    def state_dict(self) -> dict[str, Any]:
        # Row by row: one tensor of all of them would be a second bank in memory, and stay as long as one row of it.
        return {"rows": [[r.states, r.guided, r.positive, r.negative, r.w, r.begin] for r in self.rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for rows of other times, sizes or kinds."""
        rows = [self._row(*row) for row in state["rows"]]
        if len({row.states.shape for row in rows}) > 1:
            raise ValueError("the trajectories are not all of one size")
        self.rows.clear()
        self.rows.extend(rows)

    def _row(
        self, states: Tensor, guided: Tensor, positive: str, negative: str, w: float, begin: int = 0
    ) -> Trajectory:
        count = len(self.times) - 1
        if states.ndim != 4 or len(states) != count + 1 or guided.shape != (count, *states.shape[1:]):
            raise ValueError(f"a trajectory of {tuple(states.shape)} where {count + 1} states belong")
        if not isinstance(positive, str) or not isinstance(negative, str) or not isinstance(w, float) or w < 0:
            raise ValueError("a trajectory without its prompts and guidance scale")
        if not isinstance(begin, int) or not 0 <= begin < count:
            raise ValueError(f"a trajectory that begins at {begin!r} of {count} times")
        return Trajectory(states, guided, positive, negative, w, begin)
