"""Forecast outputs: what is foretold, which steps are skipped, and that every solver keeps its own history."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from sun.ltc.counts import Counts
from sun.ltc.errors import LtcError
from sun.ltc.forecast import NOISE, X0, Forecast
from sun.ltc.outputs import Outputs, OutputStepper
from sun.ltc.presets import PRESETS, SkipSettings, preset
from sun.ltc.skipping import SkipRun

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALWAYS = SkipSettings(guard=0)
LEVELS = tuple(14 * (1 - i / 20) ** 2 for i in range(21))


# ----------------------------------------------------------------------------------------------------------- forecasts


def shapes(sigma: float) -> torch.Tensor:
    """Outputs [2, 3] of two pictures that are lines in sigma."""
    return torch.tensor([[1.0, 2.0, -1.0], [0.5, -3.0, 1.0]]) + sigma * torch.tensor(
        [[0.3, 0.1, -1.0], [2.0, 1.0, 0.0]]
    )


@pytest.mark.parametrize("terms", [2, 3])
def test_what_goes_on_as_before_is_foretold_exactly(terms: int) -> None:
    forecast = Forecast(NOISE, terms)
    x = torch.randn(2, 3, generator=torch.manual_seed(0))
    for sigma in (5.0, 4.0, 2.5):  # steps of any length
        forecast.see(sigma, x, x - sigma * shapes(sigma))
    torch.testing.assert_close(forecast.output(2.0), shapes(2.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(forecast.denoised(2.0, 7 * x), 7 * x - 2 * shapes(2.0), rtol=1e-5, atol=1e-5)
    assert forecast.turned is not None
    assert float(forecast.turned.max()) < 1e-5


def test_one_term_is_the_last_output_again_which_for_euler_is_the_paper_s_step() -> None:
    """x_{i+1} = x_i + gamma D_{i-1}, gamma the ratio of the steps' lengths: LTC-Accel with w_g = 1."""
    x, sigmas = torch.randn(2, 3, generator=torch.manual_seed(1)), (5.0, 4.0, 3.5)
    forecast = Forecast(NOISE, 1)
    forecast.see(sigmas[0], x, x - sigmas[0] * shapes(5.0))
    moved = x + shapes(5.0) * (sigmas[1] - sigmas[0])
    derivative = (moved - forecast.denoised(sigmas[1], moved)) / sigmas[1]
    gamma = (sigmas[2] - sigmas[1]) / (sigmas[1] - sigmas[0])
    torch.testing.assert_close(derivative * (sigmas[2] - sigmas[1]), gamma * (moved - x), rtol=1e-5, atol=1e-5)


def test_how_much_of_a_change_goes_on_is_fitted_for_every_picture_alone() -> None:
    """One picture's output goes on as before, the other's stands still from the third call on."""
    still = shapes(4.0)[1]
    both, alone = (Forecast(NOISE, 2, ridge=0.0, memory=0.0) for _ in range(2))
    for sigma in (5.0, 4.0, 3.0):
        out = torch.stack([shapes(sigma)[0], still if sigma < 5 else shapes(5.0)[1]])
        both.see(sigma, torch.zeros(2, 3), -sigma * out)
        alone.see(sigma, torch.zeros(1, 3), -sigma * out[1:])
    assert both.factors(2).flatten().tolist() == pytest.approx([1.0, 0.0], abs=1e-5)
    torch.testing.assert_close(both.output(2.0)[1:], alone.output(2.0))
    assert both.turned is not None
    assert both.turned[0] < 1e-5 < 0.1 < both.turned[1]


def test_ridge_holds_the_fit_to_what_was_expected() -> None:
    held = Forecast(NOISE, 2, ridge=1e6)
    for sigma in (5.0, 4.0, 3.0):
        held.see(sigma, torch.zeros(1, 3), -sigma * torch.tensor([[1.0, sigma > 4, 0.0]]))
    assert float(held.factors(1)) == pytest.approx(1.0, abs=1e-3)


def test_fresh_noise_leaves_a_forecast_of_x0_alone() -> None:
    forecast = Forecast(X0, 2)
    for sigma in (5.0, 4.0):
        forecast.see(sigma, torch.randn(2, 3), shapes(sigma))
    torch.testing.assert_close(forecast.denoised(3.0, torch.randn(2, 3)), shapes(3.0), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- steps


def test_warm_up_and_tail_run_and_between_them_every_second_step_is_skipped() -> None:
    settings = SkipSettings(last=3)
    assert settings.skipped(20) == (6, 8, 10, 12, 14, 16)
    assert SkipSettings(last=3, every=3).skipped(20) == (7, 10, 13, 16)
    assert SkipSettings(last=3, every=3, row=2).skipped(20) == (6, 7, 9, 10, 12, 13, 15, 16)
    assert SkipSettings(first=0, last=1, terms=2).skipped(4) == (2,)  # a line needs two calls
    assert settings.skipped(2) == settings.skipped(0) == ()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"every": 1}, "every of 2 or more"),
        ({"row": 2}, "row of 1 to every - 1"),
        ({"terms": 4}, "terms of 1 to 3"),
        ({"first": math.nan}, "finite"),
        ({"last": 1.5}, "whole numbers"),
        ({"kind": "latents"}, "noise, x0 or automatic"),
    ],
)
def test_settings_that_cannot_be_say_what_can(values: dict[str, Any], words: str) -> None:
    with pytest.raises(LtcError, match=words):
        preset("balanced", **values)


def test_presets_and_settings_there_are_not_are_named() -> None:
    with pytest.raises(LtcError, match="fine, balanced, fast, fastest, paper, not 'quick'"):
        preset("quick")
    with pytest.raises(LtcError, match="no setting 'tau'; it has first, last"):
        preset("fast", tau=0.2)


def test_each_preset_saves_more_than_the_one_before() -> None:
    for steps in (15, 20, 25, 30, 50):
        fine, balanced, fast, fastest = (settings.calls(steps) for settings in PRESETS.values())
        assert steps > fine > balanced >= fast > fastest
        assert balanced > fast or steps < 20


# ---------------------------------------------------------------------------------------------------------- schedulers


def model(x: torch.Tensor, t: Any) -> torch.Tensor:
    """Any smooth function of latents and time will do."""
    return torch.tanh(0.7 * x) * (0.5 + 0.0005 * float(t)) + 0.1


def sample(
    scheduler: Any, settings: SkipSettings | None, steps: int = 20, model: Callable[..., torch.Tensor] = model
) -> tuple[torch.Tensor, int, Any]:
    """Latents, calls of the model, and the run; without settings the scheduler's own."""
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 4, 4, 4, generator=torch.manual_seed(3)) * getattr(scheduler, "init_noise_sigma", 1.0)
    stepper = None
    if settings is not None:
        stepper = OutputStepper(scheduler, lambda at, noisy, why: SkipRun(at, settings, noisy=noisy, refused=why))
    calls = 0
    noisy = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": torch.manual_seed(1)} if noisy else {}
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = None
        if stepper is None or not stepper.skips_next:
            calls, output = calls + 1, model(inputs, t)
        step = scheduler.step if stepper is None else stepper.step
        x = step(output, t, x, return_dict=False, **extra)[0]
    return x, calls, stepper and stepper.run


VP = {"prediction_type": "v_prediction"}
SOLVERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "ddim": ("DDIMScheduler", SD, NOISE),
    "ddim v": ("DDIMScheduler", SD | VP | {"clip_sample": False}, NOISE),
    "euler": ("EulerDiscreteScheduler", SD, NOISE),
    "euler karras": ("EulerDiscreteScheduler", SD | {"use_karras_sigmas": True}, NOISE),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", SD, NOISE),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", SD | {"solver_order": 3}, NOISE),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", SD, NOISE),
    "unipc": ("UniPCMultistepScheduler", SD, NOISE),
    "deis": ("DEISMultistepScheduler", SD, NOISE),
    "lms": ("LMSDiscreteScheduler", SD, NOISE),
    "pndm of stable diffusion": ("PNDMScheduler", SD | {"skip_prk_steps": True}, NOISE),
    "heun": ("HeunDiscreteScheduler", SD, NOISE),
    "dpm_2": ("KDPM2DiscreteScheduler", SD, NOISE),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, NOISE),
    "flow heun": ("FlowMatchHeunDiscreteScheduler", {}, NOISE),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", SD, X0),
    "dpmpp_2m sde": ("DPMSolverMultistepScheduler", SD | {"algorithm_type": "sde-dpmsolver++"}, X0),
    "ddpm": ("DDPMScheduler", SD, X0),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_scheduler_skips_on_the_first_picture_and_stays_near_its_own_full_run(name: str) -> None:
    kind, config, forecast = SOLVERS[name]
    make = getattr(diffusers, kind)
    plain, full, _ = sample(make(**config), None)
    fast, calls, run = sample(make(**config), ALWAYS)
    _, reused, _ = sample(make(**config), SkipSettings(guard=0, terms=1))
    skipped = len(ALWAYS.skipped(20))
    twice = 2 if name in ("heun", "dpm_2", "flow heun") else 1
    assert run.why == ""
    assert (run.counts.calls, run.counts.steps) == (calls, full)
    assert full - calls in (twice * skipped, twice * skipped + 1)  # PNDM asks once more at the beginning
    assert list(run._forecasts) == [forecast]
    assert reused == calls
    off = float((fast - plain).norm() / plain.norm())
    assert 0 < off < (0.01 if forecast == NOISE else 0.3)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "unipc", "deis", "euler ancestral"])
def test_a_run_that_may_skip_and_never_does_is_the_plain_one(name: str) -> None:
    kind, config, _ = SOLVERS[name]
    make = getattr(diffusers, kind)
    plain, full, _ = sample(make(**config), None)
    same, calls, run = sample(make(**config), SkipSettings(first=1.0))
    assert torch.equal(plain, same)
    assert calls == full
    assert "the first 100% and the last 2 always run" in run.counts.sentence


@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "IPNDMScheduler", "DDIMInverseScheduler"])
def test_what_is_not_known_runs_in_full_and_says_so(kind: str) -> None:
    make = getattr(diffusers, kind)
    plain, full, _ = sample(make(), None)
    same, calls, run = sample(make(), ALWAYS)
    assert torch.equal(plain, same)
    assert calls == full == run.counts.calls
    assert "not known" in run.counts.sentence or "do not fall" in run.counts.sentence


@pytest.mark.parametrize("steps", [25, 40])
def test_the_timesteps_of_stable_video_diffusion_are_logarithms_of_sigma(steps: int) -> None:
    """Those of its published scheduler, from 700 down to 0.002."""
    own = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "timestep_type": "continuous"}
    scheduler = diffusers.EulerDiscreteScheduler(
        **SD | own | {"sigma_max": 700.0, "sigma_min": 0.002, "use_karras_sigmas": True, "steps_offset": 1}
    )
    scheduler.set_timesteps(steps)
    levels, crowded = Outputs(scheduler).levels(scheduler, 0)
    assert levels == pytest.approx(scheduler.sigmas.tolist(), rel=1e-5)
    assert crowded == frozenset()
    assert levels[0] == pytest.approx(700, rel=1e-5)

    def of_a_cloud(x: torch.Tensor, t: Any) -> torch.Tensor:
        """v of pictures that lie around 1 with a deviation of 0.5; x: scaled to variance 1."""
        sigma = math.exp(4 * float(t))
        x = x * (1 + sigma**2) ** 0.5
        clean = (0.25 * x + sigma**2) / (0.25 + sigma**2)
        return (x / (1 + sigma**2) - clean) * (1 + sigma**2) ** 0.5 / sigma

    plain, _, _ = sample(scheduler, None, steps, of_a_cloud)
    fast, calls, run = sample(scheduler, ALWAYS, steps, of_a_cloud)
    assert run.counts == Counts(calls, steps)
    assert calls == ALWAYS.calls(steps)
    assert 0 < float((fast - plain).norm() / plain.norm()) < 0.15


def test_steps_whose_rounded_timesteps_are_one_all_run() -> None:
    """At the end of Karras' spacing several steps have one timestep."""
    settings = SkipSettings(guard=0, last=0, every=3, row=2)
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True)
    _, calls, run = sample(scheduler, settings, 50)
    times = scheduler.timesteps.tolist()
    levels, crowded = Outputs(scheduler).levels(scheduler, 0)
    assert len(levels) - 1 == len(set(times)) < 50
    wished = set(settings.skipped(len(levels) - 1))
    assert crowded & wished
    assert run.why == ""
    assert run.skipped == wished - crowded
    assert 50 - calls == len(run.skipped)
    heun = diffusers.HeunDiscreteScheduler(**SD, use_karras_sigmas=True)
    heun.set_timesteps(50)
    assert len(Outputs(heun).levels(heun, 0)[0]) == 51
    heun.timesteps = heun.timesteps.round()
    assert Outputs(heun).levels(heun, 0) == (levels, crowded)


# --------------------------------------------------------------------------------------------- a sampler of any kind


def test_steps_at_one_level_all_run_and_levels_that_rise_are_refused() -> None:
    doubled = (*LEVELS[:9], LEVELS[8] * (1 - 1e-6), *LEVELS[9:])
    run, made = SkipRun(doubled, SkipSettings(guard=0, last=1), noisy=False, anew={12}), []
    for i, sigma in enumerate(doubled[:-1]):
        x = torch.full((1, 4), float(i))
        run.denoised(sigma, x, lambda i=i, x=x: made.append(i) or x)
    assert sorted(set(range(21)) - set(made)) == [6, 11, 15, 17, 19]  # neither 8 nor 9; 13 follows the other model
    assert run.why == ""
    for wrong in (LEVELS[::-1], (*LEVELS[:5], LEVELS[3], *LEVELS[5:]), (*LEVELS[:4], math.nan, *LEVELS[5:])):
        refused = SkipRun(wrong, SkipSettings())
        assert "do not fall" in refused.counts.sentence
        assert not any(refused.skips(sigma) for sigma in wrong[:-1])


def test_a_sampler_without_a_name_is_looked_at_for_fresh_noise() -> None:
    def euler(run: SkipRun, fresh: float) -> torch.Tensor:
        generator = torch.manual_seed(0)
        x = LEVELS[0] * torch.randn(2, 4, 8, 8, generator=generator)
        for here, there in itertools.pairwise(LEVELS):
            denoised = run.denoised(here, x, lambda x=x, here=here: torch.tanh(x) * 0.3 + 0.01 * here)
            x = x + (x - denoised) / here * (there - here) + fresh * there * torch.randn(x.shape, generator=generator)
        return x

    for fresh, kind in ((0.0, NOISE), (0.3, X0)):
        run = SkipRun(LEVELS, ALWAYS)
        euler(run, fresh)
        assert list(run._forecasts) == [kind]
        assert run.counts.calls == ALWAYS.calls(20)


@pytest.mark.parametrize("steps", [1, 2, 4, 15, 1000])
def test_every_level_of_a_run_of_any_length_is_known_again(steps: int) -> None:
    """From the highest of Stable Diffusion to the lowest, in the spacing of Karras, as float32 gives them back."""
    ramp = torch.linspace(14.6146 ** (1 / 7), 0.0292 ** (1 / 7), steps, dtype=torch.float64) ** 7
    run = SkipRun([*ramp.tolist(), 0.0], ALWAYS, noisy=False)
    for sigma in ramp.float().tolist():
        x = torch.full((1, 4), sigma)
        run.denoised(sigma, x, lambda x=x: 0.5 * x)
    assert run.counts.calls == ALWAYS.calls(steps)
    assert (run.why == "") == (len(ALWAYS.skipped(steps)) > 0)
    assert ("one step is too few" in run.why) == (steps == 1)


def test_another_prompt_in_the_middle_of_a_run_is_a_real_step_and_what_was_seen_is_forgotten() -> None:
    run = SkipRun(LEVELS, ALWAYS)
    made = []
    for i, sigma in enumerate(LEVELS[:-1]):
        x = torch.full((1, 4), float(i))
        run.denoised(sigma, x, lambda i=i, x=x: made.append(i) or x, state="b" if i >= 11 else "a")
    skipped = sorted(set(range(20)) - set(made))
    assert skipped == [5, 7, 9, 13, 15, 17]


def test_where_another_model_takes_over_the_step_is_real_and_what_was_seen_is_forgotten() -> None:
    run = SkipRun(LEVELS, ALWAYS, anew={11})
    made = []
    for i, sigma in enumerate(LEVELS[:-1]):
        x = torch.full((1, 4), float(i))
        run.denoised(sigma, x, lambda i=i, x=x: made.append(i) or x)
    assert sorted(set(range(20)) - set(made)) == [5, 7, 9, 13, 15, 17]


def test_a_batch_of_another_size_runs() -> None:
    run = SkipRun(LEVELS, ALWAYS)
    asked = []
    for i, sigma in enumerate(LEVELS[:-1]):
        rows = 2 if i == 10 else 1
        run.denoised(sigma, torch.ones(rows, 4), lambda i=i, rows=rows: asked.append(i) or torch.ones(rows, 4))
    assert 10 in asked


@pytest.mark.parametrize(
    ("steps", "changes", "why"),
    [
        (4, {}, "4 steps are too few to skip one of"),
        (4, {"last": 30}, "4 steps are too few to skip one of"),
        (20, {"last": 30}, "the first 25% and the last 30 always run: of 20 steps all"),
        (20, {"first": 1.0}, "the first 100% and the last 2 always run: of 20 steps all"),
        (20, {}, ""),
    ],
)
def test_where_nothing_is_skipped_the_reason_is_the_one_there_is(steps: int, changes: dict[str, Any], why: str) -> None:
    levels = [float(level) for level in range(steps, -1, -1)]
    assert SkipRun(levels, SkipSettings(**changes)).why == why


def test_the_guard_runs_the_step_after_a_turn_of_any_picture_and_after_what_is_no_number() -> None:
    """A turn is more than the calls before were off, in the steps between two calls."""

    def run(spoilt: float | None, settings: SkipSettings) -> tuple[SkipRun, list[int]]:
        made, asked = SkipRun(LEVELS, settings, noisy=False), list[int]()
        for i, sigma in enumerate(LEVELS[:-1]):
            out = torch.ones(2, 4) + 0.1 * sigma * torch.tensor([1.0, -1.0, 1.0, 1.0])
            out[1, 0] = spoilt if i == 10 and spoilt is not None else out[1, 0]
            made.denoised(sigma, torch.zeros(2, 4), lambda i=i, out=out, at=sigma: asked.append(i) or -at * out)
        return made, asked

    calm, _ = run(None, SkipSettings())
    assert calm.counts == Counts(13, 20)
    for spoilt in (9.0, math.nan):
        turned, asked = run(spoilt, SkipSettings())
        assert turned.counts.guarded >= 1
        assert 11 in asked
        assert {5, 7, 9}.isdisjoint(asked)
        assert run(spoilt, SkipSettings(guard=0))[0].counts == Counts(13, 20)


def test_a_sampler_that_goes_back_to_more_noise_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    run = SkipRun(LEVELS, ALWAYS)
    asked: list[float] = []
    for sigma in (*LEVELS[:12], *LEVELS[9:-1]):
        run.denoised(sigma, torch.ones(1, 4), lambda sigma=sigma: asked.append(sigma) or torch.ones(1, 4))
    assert asked[-11:] == list(LEVELS[9:-1])
    assert caplog.text.count("went back to more noise") == 1
