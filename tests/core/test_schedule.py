"""Timesteps and DDIM steps against numpy and diffusers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from sun.pipelines.schedulers import make_scheduler
from sun.schedule import alpha_sigma, ddim_step, denoise_timesteps, trailing_timesteps

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


@pytest.mark.parametrize("steps", range(1, 51))
def test_trailing_timesteps_are_those_of_diffusers_and_of_the_formula(steps):
    scheduler = DDIMScheduler(timestep_spacing="trailing", **SD15)
    scheduler.set_timesteps(steps)
    ours = trailing_timesteps(steps)
    assert ours == scheduler.timesteps.tolist()
    assert ours == (np.round(np.arange(1000, 0, -1000 / steps)) - 1).astype(int).tolist()
    assert all(type(t) is int for t in ours)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, [999]),
        (3, [999, 666, 332]),
        (4, [999, 749, 499, 249]),
        (6, [999, 832, 666, 499, 332, 166]),
        (16, [999, 937, 874, 811, 749, 687, 624, 561, 499, 437, 374, 311, 249, 187, 124, 61]),  # half to even
    ],
)
def test_trailing_timesteps_by_hand(steps, expected):
    assert trailing_timesteps(steps) == expected


def test_trailing_timesteps_of_other_lengths():
    assert trailing_timesteps(4, num_train_timesteps=100) == [99, 74, 49, 24]
    assert trailing_timesteps(4, num_train_timesteps=4) == [3, 2, 1, 0]
    # where numpy's arange is one too long (61 steps end in -1 there)
    for steps in range(1, 1001):
        timesteps = trailing_timesteps(steps)
        assert len(timesteps) == steps
        assert timesteps[0] == 999
        assert timesteps[-1] >= 0
        assert sorted(set(timesteps), reverse=True) == timesteps


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match="between 1 and 1000"):
        trailing_timesteps(steps)


@pytest.mark.parametrize(
    ("steps", "denoise", "mode", "expected"),
    [
        (4, 1.0, "trained", [999, 749, 499, 249]),
        (4, 0.75, "trained", [749, 499, 249]),
        (4, 0.5, "trained", [499, 249]),
        (4, 0.74, "trained", [499, 249]),
        (4, 0.2, "trained", []),
        (4, 0.0, "trained", []),
        (4, 1.0, "respaced", [999, 749, 499, 249]),
        (4, 0.5, "respaced", [499, 374, 249, 124]),
        (4, 0.0, "respaced", []),
        (4, 0.001, "respaced", [3, 2, 1, 0]),
        (4, 1e-320, "respaced", [3, 2, 1, 0]),
    ],
)
def test_denoise_keeps_the_end_of_the_schedule(steps, denoise, mode, expected):
    assert denoise_timesteps(steps, denoise, mode) == expected


def test_denoise_counts_as_diffusers_strength_does():
    for steps in (1, 3, 4, 5, 8, 12):
        for percent in range(101):
            strength = percent / 100
            kept = min(int(steps * strength), steps)
            assert denoise_timesteps(steps, strength) == trailing_timesteps(steps)[steps - kept :]


def test_denoise_refuses_nonsense():
    with pytest.raises(ValueError, match="between 0 and 1"):
        denoise_timesteps(4, 1.5)
    with pytest.raises(ValueError, match="trained"):
        denoise_timesteps(4, 0.5, "other")  # type: ignore[arg-type]


@pytest.mark.parametrize("final_at_one", [True, False])
def test_ddim_step_is_that_of_diffusers(final_at_one):
    scheduler = DDIMScheduler(timestep_spacing="trailing", set_alpha_to_one=final_at_one, **SD15)
    scheduler.set_timesteps(4)
    x, eps = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for t, s in [(999, 749), (749, 499), (249, -1)]:
        expected = scheduler.step(eps, t, x).prev_sample
        end = s if s >= 0 or final_at_one else 0
        ours = ddim_step(x, eps, *alpha_sigma(scheduler.alphas_cumprod, t), *alpha_sigma(scheduler.alphas_cumprod, end))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_alpha_sigma_takes_many_timesteps_and_ends_clean():
    table = DDIMScheduler(**SD15).alphas_cumprod
    a, s = alpha_sigma(table, torch.tensor([0, 999, -1]))
    torch.testing.assert_close(a, torch.stack([table[0].sqrt(), table[999].sqrt(), torch.tensor(1.0)]))
    torch.testing.assert_close(a**2 + s**2, torch.ones(3))
    assert s[-1] == 0.0
    assert float(s[0] / a[0]) == pytest.approx(0.02917, abs=1e-5)
    assert alpha_sigma(table.tolist(), 249)[0].ndim == 0


def test_a_perfect_prediction_lands_on_the_clean_picture():
    table = DDIMScheduler(**SD15).alphas_cumprod.double()
    clean, eps = torch.randn(1, 4, 4, 4, dtype=torch.float64), torch.randn(1, 4, 4, 4, dtype=torch.float64)
    times = [*trailing_timesteps(4), -1]
    a, s = alpha_sigma(table, 999)
    x = a * clean + s * eps
    for t, after in pairwise(times):
        x = ddim_step(x, eps, *alpha_sigma(table, t), *alpha_sigma(table, after))
    torch.testing.assert_close(x, clean)


@pytest.mark.parametrize("own", ["use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"])
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc", "euler"])
def test_a_models_own_schedule_does_not_replace_the_trailing_one(name: str, own: str) -> None:
    """Some fine-tunes ship with Karras sigmas in their scheduler's configuration."""
    config = {**SD15, own: True}
    scheduler = make_scheduler(name, config)
    scheduler.set_timesteps(8)
    assert [round(float(t)) for t in scheduler.timesteps] == trailing_timesteps(8)
