"""Algorithm 1 of the SUN paper (ECCV 2024, arXiv 2312.08887): the equations of training, one function each.

Names follow the paper: ``a`` = sqrt(alphas_cumprod), ``s`` (here ``sigma``) = sqrt(1 - alphas_cumprod), ``t`` a
timestep of 0..T-1, ``Delta`` the stage length, ``N`` the teacher's DDIM sub-steps per stage. Timestep -1 means clean
data (a = 1, sigma = 0): the hosts' last step ends there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ..schedule import alpha_sigma, ddim_step

NoiseModel = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, H, W], t [B]) -> predicted noise [B, C, H, W]."""


class NoiseSchedule:
    """a_t and sigma_t of a diffusion model as [B, 1, 1, 1] tensors, with timestep -1 for clean data."""

    def __init__(self, alphas_cumprod: Tensor):
        self.num_train_timesteps = alphas_cumprod.numel()
        # Computed in float64, which Apple's GPUs do not have; the last entry is that of timestep -1.
        every = torch.tensor([*range(self.num_train_timesteps), -1])
        a, sigma = alpha_sigma(alphas_cumprod.flatten().cpu().double(), every)
        self._a, self._sigma = a.float(), sigma.float()

    def to(self, device: torch.device | str) -> NoiseSchedule:
        self._a, self._sigma = self._a.to(device), self._sigma.to(device)
        return self

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a_t, sigma_t) for timesteps -1..T-1 [B]."""
        t = t.to(self._a.device)
        return self._a[t].view(-1, 1, 1, 1), self._sigma[t].view(-1, 1, 1, 1)


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """x_t = a_t x_0 + sigma_t e (Eq. 1)."""
    a, sigma = schedule(t)
    return a * x0 + sigma * noise


def guided_noise(e_positive: Tensor, e_negative: Tensor, w: float | Tensor) -> Tensor:
    """e_cfg = w e(c_p) + (1 - w) e(c_n): classifier-free guidance, the teacher's prediction (Eq. 3).

    ``w`` is a number, or [B] with one for each row.
    """
    if isinstance(w, Tensor):
        w = w.view(-1, 1, 1, 1)
    return w * e_positive + (1 - w) * e_negative


def ddim_update(x_t: Tensor, noise: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
    """x_s = a_s (x_t - sigma_t e) / a_t + sigma_s e (Eq. 9)."""
    (a_t, sigma_t), (a_s, sigma_s) = schedule(t), schedule(s)
    return ddim_step(x_t, noise, a_t, sigma_t, a_s, sigma_s)


def step_noise(x_s: Tensor, x_t: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The constant noise whose single DDIM step takes x_t to x_s (Eq. 10)."""
    (a_t, sigma_t), (a_s, sigma_s) = schedule(t), schedule(s)
    return (x_s - a_s * x_t / a_t) / (sigma_s - a_s * sigma_t / a_t)


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """sqrt(d^2 + c^2) - c, element by element: about d^2 / 2c below c, about d above it."""
    return (difference.square() + c**2).sqrt() - c


def state_gain(t: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
    """|d x_s / d e| of Eq. 9, [B]: how far an error of the noise moves the state one step later."""
    (a_t, sigma_t), (a_s, sigma_s) = schedule(t), schedule(s)
    return (sigma_s - a_s * sigma_t / a_t).abs().flatten()


def substeps(t: Tensor, s: Tensor, n: int) -> list[Tensor]:
    """The n + 1 timesteps from t down to s, evenly spaced and rounded."""
    return [(t + (s - t) * (i / n)).round().long() for i in range(n + 1)]


def teacher_rollout(
    x_t: Tensor, t: Tensor, s: Tensor, n: int, teacher: NoiseModel, schedule: NoiseSchedule
) -> tuple[Tensor, Tensor]:
    """(x~_s, e_cfg at x_t): ``n`` DDIM sub-steps of the guided teacher, and its first prediction for L_cfg."""
    times = substeps(t, s, n)
    x, first = x_t, None
    for now, then in pairwise(times):
        noise = teacher(x, now)
        first = noise if first is None else first
        x = ddim_update(x, noise, now, then, schedule)
    assert first is not None
    return x, first


@dataclass
class StageTargets:
    """What the student is trained on: its input ``x_t`` at ``t`` and two target noises for that input.

    ``w`` [B] is each row's guidance scale where the adapter takes one, else empty.
    """

    x_t: Tensor
    t: Tensor
    e_step: Tensor
    e_cfg: Tensor
    replaced: Tensor
    w: Tensor = field(default_factory=lambda: torch.empty(0))


def stage_targets(
    x_start: Tensor,
    start: Tensor,
    t: Tensor,
    stage: int,
    n: int,
    teacher: Callable[[Tensor, Tensor, Tensor], Tensor],
    student: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
) -> StageTargets:
    """Targets of L_cfg and L_msc for one batch (Algorithm 1).

    ``x_start`` [B, C, H, W] is noised data at timestep ``start``: equal to ``t``, or ``t + stage`` for the rows whose
    input is replaced by the student's own output of the previous stage (Eq. 12-13). For those rows the teacher's
    trajectory still begins at ``x_start``, and only Eq. 10 is evaluated at the student's x_t.
    ``teacher`` and ``student`` take (x, t, rows): ``rows`` [R] are indices into the batch, for the prompts.
    """
    every = torch.arange(len(t), device=t.device)
    replaced = start != t
    x_student, x_teacher = x_start.clone(), x_start.clone()
    rows = every[replaced]
    if len(rows):
        begin, end = start[rows], t[rows]
        x_teacher[rows], _ = teacher_rollout(x_start[rows], begin, end, n, lambda x, k: teacher(x, k, rows), schedule)
        x_student[rows] = ddim_update(x_start[rows], student(x_start[rows], begin, rows), begin, end, schedule)
    s = (t - stage).clamp_min(-1)
    x_s, e_cfg = teacher_rollout(x_teacher, t, s, n, lambda x, k: teacher(x, k, every), schedule)
    if len(rows):
        e_cfg = e_cfg.clone()
        e_cfg[rows] = teacher(x_student[rows], t[rows], rows)
    return StageTargets(x_student, t, step_noise(x_s, x_student, t, s, schedule), e_cfg, replaced)
