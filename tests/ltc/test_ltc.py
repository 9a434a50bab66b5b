"""LTC-Accel: its formulas, the steps it chooses, its files, and skips in every supported solver."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
)

from sun.ltc import LtcError, LtcKey, LtcRun, LtcSettings, LtcTable, Measurements, TableStore, load_table, skipped_steps
from sun.ltc.kdiffusion import SamplerRun
from sun.ltc.keep import keep_measured, none_calm, running
from sun.ltc.schedulers import Stepper, noise_levels, sampler_of
from sun.ltc.transitions import Fit, angles
from sun.pipelines.schedulers import make_scheduler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
SCHEDULERS: dict[str, Any] = {
    "ddim": lambda: make_scheduler("ddim", DDIMScheduler(**SD, clip_sample=False).config),
    "diffusers' ddim": lambda: DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False),
    "euler": lambda: EulerDiscreteScheduler(**SD),
    "euler v": lambda: EulerDiscreteScheduler(**SD, prediction_type="v_prediction"),
    "dpmpp_2m": lambda: DPMSolverMultistepScheduler(**SD),
    "dpmpp_2m karras": lambda: DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True),
    "heun": lambda: HeunDiscreteScheduler(**SD),
    "dpm_2": lambda: KDPM2DiscreteScheduler(**SD),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}
FIXED = LtcSettings(tau=0, last=0)


# ------------------------------------------------------------------------------------------------------------ formulas


def test_angles_are_those_between_vectors() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    b = torch.tensor([[0.0, 3.0], [1.0, 1e-6], [-1.0, 0.0]])
    assert angles(a, b) == pytest.approx([math.pi / 2, 1e-6, math.pi], rel=1e-5)


def test_one_term_is_the_closed_form() -> None:
    current, previous = torch.randn(2, 3, 4, generator=torch.manual_seed(0)), torch.randn(2, 3, 4)
    fit = Fit()
    fit.add(current, [previous])
    expected = (current * previous).sum() / previous.square().sum()
    assert fit.coefficients() == pytest.approx([float(expected)], rel=1e-5)


def test_two_terms_find_what_the_transition_is_made_of() -> None:
    a, b = torch.randn(2, 50, generator=torch.manual_seed(1))
    fit = Fit(2)
    fit.add(0.8 * a - 0.3 * b, [a, b])
    assert fit.coefficients() == pytest.approx([0.8, -0.3], rel=1e-4)
    assert Fit(2).coefficients() == (0.0, 0.0)  # nothing seen


@pytest.mark.parametrize(("steps", "calls"), [(12, 8), (20, 13), (30, 19), (50, 31)])
def test_the_fixed_rule_gives_the_authors_counts(steps: int, calls: int) -> None:
    """The released defaults, accelerators.md section 1: 12->8, 20->13, 30->19, 50->31."""
    assert steps - len(skipped_steps([0.0] * (steps - 1), FIXED)) == calls


def test_the_interval_is_the_longest_calm_run_away_from_both_ends() -> None:
    turns = [0.01] * 19
    turns[10] = 0.5  # theta_11
    settings = LtcSettings(tau=0.1)
    # allowed: 6 ... 17 of 20 steps; calm: 6-10 and 12-17
    assert skipped_steps(turns, settings) == (13, 15, 17)
    assert skipped_steps([0.5] * 19, settings) == ()
    assert skipped_steps(turns, LtcSettings(tau=0.1, every=3)) == (14, 17)
    for wrong in ({"every": 1}, {"every": 2.5}, {"last": 0.5}, {"every": math.inf}, {"tau": math.nan}):
        with pytest.raises(LtcError, match="every of 2 or more"):
            LtcSettings(**wrong)


# --------------------------------------------------------------------------------------------------------------- files


def table(steps: int = 8, **settings: Any) -> LtcTable:
    key = LtcKey("abc", "euler", tuple(float(steps - i) for i in range(steps + 1)), 7.5)
    return LtcTable(key, LtcSettings(**settings), {5: (0.9,)}, tuple([0.05] * (steps - 1)), 1.01, 3, True)


def test_a_table_survives_its_file_and_is_found_by_everything_it_depends_on(tmp_path: Path) -> None:
    made = table()
    path = TableStore(tmp_path).put(made)
    assert path is not None
    assert load_table(path) == made
    assert TableStore(tmp_path).find(made.key, made.settings) == made
    other_w = LtcKey(made.key.model, made.key.sampler, made.key.sigmas, 5.0)
    assert TableStore(tmp_path).find(other_w, made.settings) is None
    assert TableStore(tmp_path).find(made.key, LtcSettings(tau=0.2)) is None
    path.unlink()
    assert TableStore(tmp_path).find(made.key, made.settings) is None


def test_a_table_of_whole_numbers_is_found_again(tmp_path: Path) -> None:
    key = LtcKey("abc", "euler", tuple(range(8, -1, -1)), 7)
    made = LtcTable(key, LtcSettings(tau=0), {5: (1,)}, (), 1, 3)
    TableStore(tmp_path).put(made)
    assert TableStore(tmp_path).find(key, LtcSettings(tau=0)) == made


@pytest.mark.parametrize(
    "sampler",
    ["../../escaped", "/etc/passwd", "a/b", "..\\..\\x", "C:\\x", "\0", "\x1b[2J", "x" * 200, "", "..", "DPM++ 2M"],
)
def test_a_table_is_kept_in_its_folder_whatever_its_sampler_is_called(tmp_path: Path, sampler: str) -> None:
    made = table()
    made = replace(made, key=replace(made.key, sampler=sampler))
    made = LtcTable.from_json(json.loads(json.dumps(made.to_json())))
    folder = tmp_path / "a" / "b"
    path = TableStore(folder).put(made)
    assert path is not None
    assert path.resolve().parent == folder.resolve()
    assert path.name.isprintable()
    assert len(path.name) < 100
    assert TableStore(folder).find(made.key, made.settings) == made
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_names_of_ordinary_samplers_stay_so_that_tables_are_found_again() -> None:
    # what version 0.1 named it
    assert table().key.file_name(LtcSettings()) == "euler-8-84268c0bf492.json"


def test_a_table_under_another_ones_name_is_refused(tmp_path: Path) -> None:
    made = table()
    path = TableStore(tmp_path).put(made)
    assert path is not None
    other = replace(made, key=replace(made.key, model="other"))
    path.write_text(json.dumps(other.to_json()))
    with pytest.raises(LtcError, match="another model"):
        TableStore(tmp_path).find(made.key, made.settings)


@pytest.mark.parametrize(
    ("turns", "tau", "words"),
    [
        ([0.5] * 3, 0.1, "so few steps"),
        ([0.5] * 7, 0.0, "so few steps"),
        ([0.01, 0.01, 0.3, 0.25, 0.4, 0.01, 0.01], 0.1, r"turn by 0\.25 radians or more, and tau is 0\.1"),
        ([0.5, 0.5, 0.5, 0.05, 0.5, 0.5, 0.5], 0.1, "too few steps in a row"),
    ],
)
def test_it_says_why_no_step_is_skipped(turns: list[float], tau: float, words: str) -> None:
    """Turns at both ends, where no step is skipped anyway, are no reason."""
    assert re.search(words, none_calm(turns, LtcSettings(tau=tau)))


def test_a_folder_that_cannot_be_written_does_not_cost_the_picture(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    measured, key = Measurements(8, LtcSettings(tau=0.0)), LtcKey("model", "euler", tuple(range(9, 0, -1)), 7.0)
    run = LtcRun(8, measure=measured)
    for i in range(8):
        run.enter(i, torch.full((1, 4), float(i)))
    run.finish(torch.full((1, 4), 8.0))
    table = keep_measured(measured, key, TableStore(tmp_path / "file" / "ltc"))
    assert table is not None
    assert set(table.coefficients) == {3, 5}
    assert "measures again" in caplog.text


@pytest.mark.parametrize("tau", [0.1, 0.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_picture_of_nan_leaves_no_table_and_the_next_run_measures_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tau: float, bad: float
) -> None:
    sigmas = tuple(float(20 - i) for i in range(21))
    key, settings, told = LtcKey("m", "euler", sigmas, 7.5), LtcSettings(tau=tau), list[LtcTable]()

    def euler(spoilt: bool) -> LtcRun:
        with running(key, settings, TableStore(tmp_path), said=told.append) as run:
            sampler, x = SamplerRun("euler", sigmas, run), 20 * torch.ones(2, 4)
            for i, sigma in enumerate(sigmas[:-1]):
                clean = x / (1 + sigma**2) + (torch.tensor([[bad], [0.0]]) if spoilt and i > 10 else 0.0)
                denoised = sampler.denoised(sigma, x, lambda clean=clean: clean)
                x = x + (x - denoised) / sigma * (sigmas[i + 1] - sigma)
            run.finish(x)
        return run

    lost = euler(spoilt=True)
    assert lost.counts.calls == 20
    assert "keeps nothing: a picture of it holds NaN" in lost.counts.sentence
    assert "keeps nothing of what this run measured" in caplog.text
    assert (list(tmp_path.iterdir()), told) == ([], [])
    assert euler(spoilt=False).counts.why == "it measured itself at full cost"
    assert len(told) == len(list(tmp_path.iterdir())) == 1
    assert euler(spoilt=False).counts.why == ""


def test_a_fit_of_nan_is_nan_so_that_calibrating_ends_in_its_own_sentence() -> None:
    fit = Fit(2)
    fit.add(torch.ones(1, 4), [torch.ones(1, 4), torch.tensor([[1.0, math.inf, 0.0, 0.0]])])
    assert all(map(math.isnan, fit.coefficients()))


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": "sun-ltc-9"}', "step", "nan"])
def test_damaged_tables_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "table.json"
    content = table().to_json()
    if damage == "step":
        damage = json.dumps({**content, "coefficients": {"99": [1.0]}})
    elif damage == "nan":
        damage = json.dumps({**content, "bias": float("nan")})
    path.write_text(damage)
    with pytest.raises(LtcError, match=r"table\.json.*[Cc]alibrate again"):
        load_table(path)


# ------------------------------------------------------------------------------------------------------------- solvers


def model(x: torch.Tensor, t: Any) -> torch.Tensor:
    """Any smooth function of latents and time will do."""
    return torch.tanh(0.7 * x) * (0.5 + 0.001 * float(t)) + 0.1


def sample(scheduler: Any, steps: int, open_run: Any) -> tuple[torch.Tensor, int, list[torch.Tensor]]:
    """Latents, model calls, and the latents at the beginning of every call."""
    scheduler.set_timesteps(steps)
    calls, seen = 0, []
    x = torch.randn(2, 4, 4, 4, generator=torch.manual_seed(3)) * getattr(scheduler, "init_noise_sigma", 1.0)
    stepper = Stepper(scheduler, open_run)
    for t in scheduler.timesteps:
        seen.append(x)
        predicted = None
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        if not stepper.skips_next:
            calls, predicted = calls + 1, model(inputs, t)
        x = stepper.step(predicted, t, x, return_dict=False)[0]
    return x, calls, seen


@pytest.mark.parametrize("name", SCHEDULERS)
def test_measuring_changes_nothing_and_skips_go_where_they_should(name: str) -> None:
    steps = 12
    scheduler = SCHEDULERS[name]()
    measured = Measurements(steps, FIXED)
    plain, calls, _ = sample(scheduler, steps, lambda *_: LtcRun(steps, measure=measured))

    scheduler.set_timesteps(steps)
    x = torch.randn(2, 4, 4, 4, generator=torch.manual_seed(3)) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(inputs, t), t, x, return_dict=False)[0]
    assert torch.equal(plain, x)

    key = LtcKey("m", sampler_of(scheduler), noise_levels(scheduler), 1.0)
    found = measured.table(key)
    assert tuple(found.coefficients) == (5, 7, 9, 11)
    own_steps: list[torch.Tensor] = []
    original = scheduler.step

    def spy(*args: Any, **kwargs: Any) -> Any:
        own_steps.append(original(*args, **kwargs)[0])
        return (own_steps[-1],)

    scheduler.step = spy
    fast, fast_calls, seen = sample(scheduler, steps, lambda *_: LtcRun(steps, table=found))
    a_step = 2 if name in ("heun", "dpm_2") else 1
    assert calls == a_step * steps - (a_step - 1)
    assert fast_calls == calls - 4 * a_step + (a_step - 1)  # the last step of Heun and DPM2 is a single call
    # x_{i+1} = x_i + c (x_i - x_{i-1}), in the sigma parametrisation
    unit = name.startswith(("d", "dp")) and name != "dpm_2"
    starts = [x * ((1 + s * s) ** 0.5 if unit else 1.0)
              for x, s in zip([*seen[::a_step], fast], key.sigmas, strict=True)]  # fmt: skip
    for i, (c,) in found.coefficients.items():
        torch.testing.assert_close(starts[i + 1], starts[i] + c * (starts[i] - starts[i - 1]), rtol=1e-4, atol=1e-4)
        # the solver got there by itself, from the output it was handed, so its history fits
        torch.testing.assert_close(own_steps[min((i + 1) * a_step, len(own_steps)) - 1], [*seen, fast][min(
            (i + 1) * a_step, len(seen))], rtol=1e-3, atol=1e-3)  # fmt: skip
    assert (fast - plain).abs().max() < 0.5 * (plain - seen[0]).abs().max()


def test_a_skip_of_euler_is_the_last_derivative_again() -> None:
    """denoised = x - sigma * w_g * (x_prev - denoised_prev) / sigma_prev, with c = w_g * gamma (accelerators.md)."""
    scheduler = SCHEDULERS["euler"]()
    scheduler.set_timesteps(8)
    sigmas = noise_levels(scheduler)
    w_g = 0.97
    gamma = (sigmas[6] - sigmas[5]) / (sigmas[5] - sigmas[4])
    key = LtcKey("m", "euler", sigmas, 1.0)
    skip = LtcTable(key, FIXED, {5: (w_g * gamma,)})
    _, _, seen = sample(scheduler, 8, lambda *_: LtcRun(8, table=skip))
    x_prev, x, reached = seen[4:7]
    derivative = (x - x_prev) / (sigmas[5] - sigmas[4])
    denoised = x - sigmas[5] * w_g * derivative
    expected = x + (x - denoised) / sigmas[5] * (sigmas[6] - sigmas[5])
    torch.testing.assert_close(reached, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun"])
def test_error_aware_fits_follow_the_trajectory_with_skips(name: str) -> None:
    """Using the fitted coefficients gives the very latents that fitting went through."""
    steps = 12
    scheduler = SCHEDULERS[name]()
    fits = {i: Fit() for i in (5, 7, 9)}
    fitting, _, _ = sample(scheduler, steps, lambda *_: LtcRun(steps, fits=fits))
    key = LtcKey("m", sampler_of(scheduler), noise_levels(scheduler), 1.0)
    found = LtcTable(key, FIXED, {i: fit.coefficients() for i, fit in fits.items()})
    using, _, _ = sample(scheduler, steps, lambda *_: LtcRun(steps, table=found))
    torch.testing.assert_close(using, fitting, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (EulerAncestralDiscreteScheduler(**SD), "fresh noise.*Use Euler, DDIM"),
        (DPMSolverMultistepScheduler(**SD, algorithm_type="sde-dpmsolver++"), "fresh noise.*Use Euler, DDIM"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "fresh noise"),
        (PNDMScheduler(), "does not know.*Use Euler, DDIM"),
        (DDIMScheduler(**SD, clip_sample=True), "clip_sample=False"),
    ],
)
def test_samplers_that_cannot_be_accelerated_are_refused(scheduler: Any, words: str) -> None:
    with pytest.raises(LtcError, match=words):
        sampler_of(scheduler)


def test_eta_is_refused_when_it_comes() -> None:
    scheduler = SCHEDULERS["ddim"]()
    scheduler.set_timesteps(4)
    stepper = Stepper(scheduler, lambda *_: LtcRun(4, measure=Measurements(4, FIXED)))
    x = torch.zeros(1, 4, 4, 4)
    with pytest.raises(LtcError, match=r"eta = 0\.5.*fresh noise"):
        stepper.step(x, scheduler.timesteps[0], x, eta=0.5)
