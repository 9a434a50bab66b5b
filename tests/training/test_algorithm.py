"""Algorithm 1 against slow, obvious versions of its equations."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler

from sun.training.algorithm import (
    NoiseSchedule,
    add_noise,
    ddim_update,
    guided_noise,
    pseudo_huber,
    stage_targets,
    step_noise,
    substeps,
    teacher_rollout,
)
from sun.training.config import SunTrainConfig
from sun.training.data.negative_phrases import NegativePrompts
from sun.training.targets import draw_timesteps, start_timesteps, sun_losses

SCHEDULER = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing"
)
ABAR = SCHEDULER.alphas_cumprod


@pytest.fixture
def schedule() -> NoiseSchedule:
    return NoiseSchedule(ABAR)


def scalars(t: int) -> tuple[float, float]:
    abar = 1.0 if t < 0 else float(ABAR[t])
    return math.sqrt(abar), math.sqrt(1 - abar)


def wavy_model(x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A made-up noise model that depends on the picture, the time and the row (the prompt)."""
    return torch.sin(3 * x) * 0.5 + 0.3 * (t.view(-1, 1, 1, 1) / 1000) + 0.1 * rows.view(-1, 1, 1, 1)


def student_model(x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return wavy_model(x, t, rows) * 0.7 - 0.2


def slow_ddim(x: torch.Tensor, noise: torch.Tensor, t: int, s: int) -> torch.Tensor:
    (a_t, sigma_t), (a_s, sigma_s) = scalars(t), scalars(s)
    x0 = (x - sigma_t * noise) / a_t
    return a_s * x0 + sigma_s * noise


def slow_rollout(x: torch.Tensor, t: int, s: int, n: int, row: int) -> torch.Tensor:
    times = [round(t + (s - t) * i / n) for i in range(n + 1)]
    for now, then in pairwise(times):
        x = slow_ddim(x, wavy_model(x[None], torch.tensor([now]), torch.tensor([row]))[0], now, then)
    return x


def test_add_noise_is_the_schedulers(schedule: NoiseSchedule) -> None:
    x0, noise = torch.randn(2, 3, 4, 4, 4)
    t = torch.tensor([0, 499, 999])
    assert torch.allclose(add_noise(x0, noise, t, schedule), SCHEDULER.add_noise(x0, noise, t), atol=1e-6)


def test_ddim_update_is_diffusers_ddim(schedule: NoiseSchedule) -> None:
    SCHEDULER.set_timesteps(4)
    x, noise = torch.randn(2, 1, 4, 4, 4)
    for t, s in ((999, 749), (749, 499), (249, -1)):
        expected = SCHEDULER.step(noise, t, x).prev_sample
        assert torch.allclose(
            ddim_update(x, noise, torch.tensor([t]), torch.tensor([s]), schedule), expected, atol=1e-5
        )


def test_guided_noise_is_classifier_free_guidance() -> None:
    positive, negative = torch.randn(2, 2, 4, 4, 4)
    assert torch.allclose(guided_noise(positive, negative, 8.0), negative + 8.0 * (positive - negative), atol=1e-5)
    assert torch.equal(guided_noise(positive, negative, 1.0), positive)


def test_step_noise_inverts_the_update(schedule: NoiseSchedule) -> None:
    x, noise = torch.randn(2, 3, 4, 4, 4)
    t, s = torch.tensor([999, 600, 100]), torch.tensor([749, 350, -1])
    moved = ddim_update(x, noise, t, s, schedule)
    assert torch.allclose(step_noise(moved, x, t, s, schedule), noise, atol=1e-3)


def test_substeps_cover_the_stage_evenly() -> None:
    times = substeps(torch.tensor([999, 249]), torch.tensor([749, -1]), 5)
    assert [x.tolist() for x in times] == [[999, 249], [949, 199], [899, 149], [849, 99], [799, 49], [749, -1]]


@pytest.mark.parametrize("n", [1, 2, 6])
def test_rollout_matches_the_obvious_loop(schedule: NoiseSchedule, n: int) -> None:
    x = torch.randn(2, 4, 4, 4)
    t, s, rows = torch.tensor([999, 120]), torch.tensor([749, -1]), torch.arange(2)
    end, first = teacher_rollout(x, t, s, n, lambda y, k: wavy_model(y, k, rows), schedule)
    assert torch.equal(first, wavy_model(x, t, rows))
    for i in range(2):
        assert torch.allclose(end[i], slow_rollout(x[i], int(t[i]), int(s[i]), n, i), atol=1e-4)


def test_targets_without_replacement(schedule: NoiseSchedule) -> None:
    x = torch.randn(2, 4, 4, 4)
    t = torch.tensor([999, 499])
    out = stage_targets(x, t, t, 250, 3, wavy_model, student_model, schedule)
    assert torch.equal(out.x_t, x)
    assert not out.replaced.any()
    assert torch.equal(out.e_cfg, wavy_model(x, t, torch.arange(2)))
    for i in range(2):
        end = slow_rollout(x[i], int(t[i]), int(t[i]) - 250, 3, i)
        reached = slow_ddim(x[i], out.e_step[i], int(t[i]), int(t[i]) - 250)
        assert torch.allclose(reached, end, atol=1e-4), "one DDIM step with e_step must land on the teacher's end"


def test_replaced_input_aims_at_the_teachers_original_trajectory(schedule: NoiseSchedule) -> None:
    x = torch.randn(3, 4, 4, 4)
    start, t = torch.tensor([999, 499, 749]), torch.tensor([749, 499, 499])
    out = stage_targets(x, start, t, 250, 3, wavy_model, student_model, schedule)
    assert out.replaced.tolist() == [True, False, True]
    for i in (0, 2):
        student = slow_ddim(
            x[i], student_model(x[i : i + 1], start[i : i + 1], torch.tensor([i]))[0], int(start[i]), int(t[i])
        )
        assert torch.allclose(out.x_t[i], student, atol=1e-5), "the input is the student's own output (Eq. 12)"
        on_teacher = slow_rollout(slow_rollout(x[i], int(start[i]), int(t[i]), 3, i), int(t[i]), int(t[i]) - 250, 3, i)
        on_student = slow_rollout(out.x_t[i], int(t[i]), int(t[i]) - 250, 3, i)
        reached = slow_ddim(out.x_t[i], out.e_step[i], int(t[i]), int(t[i]) - 250)
        assert torch.allclose(reached, on_teacher, atol=1e-4), (
            "the target is the teacher's original trajectory (Eq. 13)"
        )
        assert not torch.allclose(reached, on_student, atol=1e-3)
        assert torch.allclose(
            out.e_cfg[i], wavy_model(out.x_t[i : i + 1], t[i : i + 1], torch.tensor([i]))[0], atol=1e-6
        )
    assert torch.equal(out.x_t[1], x[1])


def test_losses_vanish_only_at_their_targets(schedule: NoiseSchedule) -> None:
    t = torch.tensor([999])
    out = stage_targets(torch.randn(1, 4, 4, 4), t, t, 250, 3, wavy_model, student_model, schedule)
    cfg, msc = sun_losses(out.e_cfg, out)
    assert cfg == 0 < msc
    cfg, msc = sun_losses(out.e_step, out)
    assert msc == 0 < cfg


def test_pseudo_huber_is_squared_near_zero_and_linear_far_from_it() -> None:
    d = torch.tensor([0.0, 1e-4, -1e-4, 50.0, -50.0], dtype=torch.float64)
    assert pseudo_huber(d, 0.1).tolist() == pytest.approx([(x * x + 0.01) ** 0.5 - 0.1 for x in d.tolist()])
    near, far = 0.2 * pseudo_huber(d[1:3], 0.1), pseudo_huber(d[3:], 0.1)
    torch.testing.assert_close(near, d[1:3].square(), rtol=1e-5, atol=0)
    torch.testing.assert_close(far, d[3:].abs() - 0.1, rtol=1e-5, atol=0)


def test_timesteps_are_uniform_by_default_and_stage_starts_on_request() -> None:
    rng = random.Random(0)
    drawn = draw_timesteps(SunTrainConfig(), 2000, 1000, rng)
    assert drawn.min() < 20
    assert drawn.max() > 980
    assert abs(drawn.float().mean() - 500) < 30
    starts = draw_timesteps(SunTrainConfig(stage_start_probability=1.0), 200, 1000, rng)
    assert set(starts.tolist()) == {999, 749, 499, 249}


def test_replacement_happens_with_probability_p_and_never_before_the_first_stage() -> None:
    rng = random.Random(0)
    t = torch.full((4000,), 400)
    start = start_timesteps(SunTrainConfig(), t, 1000, rng)
    assert 0.07 < (start == 650).float().mean() < 0.13
    assert ((start == 650) | (start == 400)).all()
    late = torch.full((100,), 800)
    assert torch.equal(start_timesteps(SunTrainConfig(replace_probability=1.0), late, 1000, rng), late)


def test_papers_settings_are_the_defaults() -> None:
    config = SunTrainConfig()
    assert (config.guidance_scale, config.msc_weight, config.stage_length, config.replace_probability) == (
        8,
        1,
        0.25,
        0.1,
    )
    assert (config.run.lr, config.run.weight_decay, config.substeps) == (1e-4, 0.01, 6)
    assert (config.run.batch_size, config.run.steps, config.max_negative_phrases) == (32, 5000, 100)


@pytest.mark.parametrize("data", ["emoji:twemoji", "some/folder"])
def test_negative_prompts(data: str) -> None:
    negatives = NegativePrompts.load("auto", data, 100, 0.05)
    assert len(negatives.phrases) >= 300
    rng = random.Random(0)
    counts = [len(text.split(", ")) if text else 0 for text in (negatives.draw(rng) for _ in range(800))]
    assert min(counts) == 0
    assert max(counts) > 90
    assert 40 < sum(counts) / len(counts) < 55
