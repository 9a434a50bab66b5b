"""Guided trajectories as training inputs: states, targets and roll-outs against what they must be."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

import sun
from sun.common.settings import ConfigError, apply, read_config
from sun.lab.emoji.base import sd15_scheduler
from sun.lab.emoji.ship import ship_adapter
from sun.pipelines.schedulers import make_scheduler
from sun.surgery import from_unet
from sun.training.algorithm import NoiseSchedule, ddim_update
from sun.training.config import RunConfig, SunTrainConfig, check_settings
from sun.training.models import FrozenModels
from sun.training.run import TrainingRun
from sun.training.sun import train_sun
from sun.training.targets import state_weights, weighted
from sun.training.trajectories import TrajectoryBank, run_teacher
from sun.training.variants import variant_configs

SCHEDULE = NoiseSchedule(sd15_scheduler().alphas_cumprod)
SHAPE = (4, 2, 2)
PATH = [999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82, -1]


def bend(x: Tensor, t: Tensor, *_: object) -> Tensor:
    """A teacher whose prediction depends on the state and the time."""
    return 0.5 * x + (t / 1000).view(-1, 1, 1, 1)


def bank(
    count: int = 6, teacher=bend, solver: str = "ddim", span: int = 1, start_probability: float = 1.0, begin: int = 0
) -> TrajectoryBank:
    torch.manual_seed(0)
    text = torch.zeros(count, 77, 8)
    start = torch.randn(count, *SHAPE)
    states, guided = run_teacher(teacher, start, text, text, 4, 3, solver, sd15_scheduler().config, 3 // span, begin)
    filled = TrajectoryBank(count, 4, SCHEDULE, random.Random(0), torch.device("cpu"), span, start_probability)
    filled.add(states, guided, [f"p{i}" for i in range(count)], [f"n{i}" for i in range(count)], begin=begin)
    return filled


def test_states_lie_on_the_teachers_path() -> None:
    row = bank().rows[0]
    assert row.states.shape == (5, *SHAPE)
    x = row.states[0][None]
    for i, (now, then) in enumerate(pairwise(PATH)):
        now, then = torch.tensor([now]), torch.tensor([then])
        if i % 3 == 0:
            torch.testing.assert_close(row.states[i // 3], x[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(row.guided[i // 3], bend(x, now, x, x)[0], rtol=1e-4, atol=1e-4)
        x = ddim_update(x, bend(x, now, x, x), now, then, SCHEDULE)
    torch.testing.assert_close(row.states[4], x[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("replace", "depth"), [(0.0, 1), (1.0, 1), (1.0, 3)])
def test_every_target_leads_to_the_teachers_next_state(replace: float, depth: int) -> None:
    filled = bank(24)
    rows, text = list(filled.rows), torch.zeros(24, 77, 8)

    def student(x: Tensor, t: Tensor, *_: object) -> Tensor:
        return 0.9 * bend(x, t)

    targets = filled.stage_batch(rows, student, bend, text, text, replace, depth, need_guided=True)
    s = (targets.t - 250).clamp_min(-1)
    arrived = ddim_update(targets.x_t, targets.e_step, targets.t, s, SCHEDULE)
    stage = [(999 - t) // 250 for t in targets.t.tolist()]
    goal = torch.stack([r.states[k + 1] for r, k in zip(rows, stage, strict=True)])
    torch.testing.assert_close(arrived, goal, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(targets.e_cfg, bend(targets.x_t, targets.t, text, text), rtol=1e-4, atol=1e-4)
    on_path = torch.stack([r.states[k] for r, k in zip(rows, stage, strict=True)])
    moved = (targets.x_t - on_path).abs().amax((1, 2, 3)) > 1e-6
    assert torch.equal(moved, targets.replaced)
    assert len(set(stage)) == 4
    if replace:
        assert targets.replaced.sum() == sum(k > 0 for k in stage)


@pytest.mark.parametrize(("replace", "depth"), [(0.0, 1), (1.0, 2)])
def test_between_the_stages_a_target_is_the_state_one_stage_later(replace: float, depth: int) -> None:
    filled = bank(48, span=3, start_probability=0.25)
    rows, text = list(filled.rows), torch.zeros(48, 77, 8)
    assert rows[0].states.shape == (13, *SHAPE)
    assert filled.times.tolist() == PATH

    def student(x: Tensor, t: Tensor, *_: object) -> Tensor:
        return 0.9 * bend(x, t)

    targets = filled.stage_batch(rows, student, bend, text, text, replace, depth, need_guided=True)
    places = [PATH.index(t) for t in targets.t.tolist()]
    assert len(set(places)) > 8
    assert sum(k % 3 == 0 for k in places) > len(places) / 3
    ends = torch.tensor([PATH[min(k + 3, 12)] for k in places])
    arrived = ddim_update(targets.x_t, targets.e_step, targets.t, ends, SCHEDULE)
    goal = torch.stack([r.states[min(k + 3, 12)] for r, k in zip(rows, places, strict=True)])
    torch.testing.assert_close(arrived, goal, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(targets.e_cfg, bend(targets.x_t, targets.t, text, text), rtol=1e-4, atol=1e-4)
    assert targets.replaced.sum() == (sum(k >= 3 for k in places) if replace else 0)
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        if not targets.replaced[i]:
            torch.testing.assert_close(targets.x_t[i], row.states[place])


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("begin", [1, 3, 7, 11])
def test_a_trajectory_that_begins_later_is_image_to_image(solver: str, begin: int) -> None:
    row = bank(solver=solver, span=3, begin=begin).rows[0]
    scheduler = make_scheduler(solver, sd15_scheduler().config)
    scheduler.set_timesteps(12)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    assert row.begin == begin
    assert not row.states[:begin].any()
    assert not row.guided[:begin].any()
    x = row.states[begin][None]
    for i, t in list(enumerate(scheduler.timesteps))[begin:]:
        predicted = bend(x, t.view(1))
        torch.testing.assert_close(row.guided[i], predicted[0], rtol=1e-4, atol=1e-4)
        x = scheduler.step(predicted, t, x, return_dict=False)[0]
        torch.testing.assert_close(row.states[i + 1], x[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("begin", [1, 3, 7, 11])
@pytest.mark.parametrize("start_probability", [0.0, 1.0])
def test_no_input_lies_before_its_trajectory_begins(begin: int, start_probability: float) -> None:
    filled = bank(64, span=3, begin=begin, start_probability=start_probability)
    rows, text = list(filled.rows), torch.zeros(64, 77, 8)
    targets = filled.stage_batch(rows, bend, bend, text, text, 1.0, 3, need_guided=True)
    places = [PATH.index(t) for t in targets.t.tolist()]
    expected = range(begin, 12, 3) if start_probability else range(begin, 12)
    assert set(places) == set(expected)
    assert targets.replaced.tolist() == [k - begin >= 3 for k in places]
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        goal = row.states[min(place + 3, 12)]
        t, s = targets.t[i : i + 1], torch.tensor([PATH[min(place + 3, 12)]])
        arrived = ddim_update(targets.x_t[i : i + 1], targets.e_step[i : i + 1], t, s, SCHEDULE)
        torch.testing.assert_close(arrived[0], goal, rtol=1e-3, atol=1e-3)


def test_rows_of_a_pair_are_drawn_together_and_share_their_time() -> None:
    torch.manual_seed(0)
    text, noise = torch.zeros(12, 77, 8), torch.randn(12, *SHAPE)
    states, guided = run_teacher(bend, noise, text, text, 4, 3, "ddim", sd15_scheduler().config, 1)
    filled = TrajectoryBank(9, 4, SCHEDULE, random.Random(0), torch.device("cpu"), 3, 0.5, group=2)
    filled.add(states, guided, [f"p{i // 2}" for i in range(12)], [f"n{i % 2}" for i in range(12)])
    assert [row.positive for row in filled.rows] == ["p2", "p2", "p3", "p3", "p4", "p4", "p5", "p5"]  # no half pair
    rows = filled.pick(32)
    assert len({row.positive for row in rows}) == 4
    text = torch.zeros(32, 77, 8)
    targets = filled.stage_batch(rows, bend, bend, text, text, 0.5, 3, need_guided=False)
    for a, b in zip(rows[0::2], rows[1::2], strict=True):
        assert (a.positive, a.negative, b.negative) == (b.positive, "n0", "n1")
    assert torch.equal(targets.t[0::2], targets.t[1::2])
    assert torch.equal(targets.replaced[0::2], targets.replaced[1::2])
    assert len(set(targets.t.tolist())) > 4
    assert targets.replaced.any()
    assert not targets.replaced.all()


@pytest.mark.parametrize("error", ["noise", "state"])
def test_the_error_of_what_a_negative_changes_does_not_know_what_both_rows_share(error: str) -> None:
    torch.manual_seed(0)
    filled, text = bank(8), torch.zeros(8, 77, 8)
    filled.group = 2
    targets = filled.stage_batch(list(filled.rows), bend, bend, text, text, 0.0, 1, need_guided=True)
    shared = torch.randn(4, *SHAPE).repeat_interleave(2, 0)
    own = torch.zeros_like(targets.e_step)
    own[0] = 2.0
    config = SunTrainConfig(msc_error=error, negative_weight=3.0, cfg_weight=0.0)
    plain = replace(config, negative_weight=0.0)
    weights = state_weights(config, targets.t, SCHEDULE) if error == "state" else torch.ones(8)
    for predicted, expected in ((targets.e_step + shared, 0.0), (targets.e_step + shared + own, 4 * weights[0] / 4)):
        losses, without = (
            weighted(c, lambda *_, e=predicted: e, targets, text, text, SCHEDULE) for c in (config, plain)
        )
        torch.testing.assert_close(losses["negative"], torch.as_tensor(expected), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(losses["total"], without["total"] + 3 * losses["negative"])


def test_pairs_differ_in_the_negative_alone(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    def add(self: TrajectoryBank, states: Tensor, guided: Tensor, *texts: Any) -> None:
        seen.append((states, *texts))
        original(self, states, guided, *texts)

    original = TrajectoryBank.add
    run = RunConfig(output=str(tmp_path / "run"), steps=4, batch_size=4, precision="fp32", lr=1e-3)
    config = SunTrainConfig(
        run=run, model=str(tiny_model), data=str(pictures), substeps=2, guidance_scale=3.0, trajectories=True,
        guidance_range=(1.0, 8.0), resolution=64, negative_weight=2.0, picture_starts=0.5, target_reuse=1,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrajectoryBank, "add", add)
        adapter = sun.SunAdapter.load(train_sun(config))
    assert adapter.info.training["losses"]["negative"] > 0
    negatives = []
    for states, positives, these, w, begin in seen:
        assert positives[0::2] == positives[1::2]
        assert torch.equal(w[0::2], w[1::2])
        assert torch.equal(states[0::2, begin], states[1::2, begin])
        negatives += these
    assert len(set(w.tolist())) == 2
    assert "" in negatives[1::2]


def test_a_roll_out_begins_where_the_trajectory_does() -> None:
    def straight(x: Tensor, *_: object) -> Tensor:
        return torch.full_like(x, 0.3)

    banks = [bank(4, straight, span=3, begin=begin) for begin in (0, 3, 7)]
    mixed = [row for filled in banks for row in filled.rows]
    for rows in (mixed, list(banks[2].rows)):
        text = torch.zeros(len(rows), 77, 8)
        assert banks[0].rollout(rows, straight, text, text) < 1e-6
        assert banks[0].rollout(rows, bend, text, text) > 1e-3


def test_weights_turn_the_error_of_the_noise_into_that_of_the_next_state() -> None:
    torch.manual_seed(0)
    t = torch.tensor([999, 749, 499, 249, 600, 100])
    s = (t - 250).clamp_min(-1)
    x, right, wrong = torch.randn(3, 6, *SHAPE)
    moved = [ddim_update(x, e, t, s, SCHEDULE) for e in (right, wrong)]
    states = (moved[0] - moved[1]).square().mean((1, 2, 3))
    noises = (right - wrong).square().mean((1, 2, 3))
    weights = state_weights(SunTrainConfig(), t, SCHEDULE)
    torch.testing.assert_close(weights / weights[0], (states / noises) / (states / noises)[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weights[:4].mean(), torch.tensor(1.0))
    assert weights[0] > weights[1] > weights[2] > 0


@pytest.mark.parametrize(("huber_c", "msc_error"), [(0.0, "noise"), (0.0, "state"), (0.1, "noise"), (0.1, "state")])
def test_the_loss_is_made_of_the_errors_asked_for(huber_c: float, msc_error: str) -> None:
    torch.manual_seed(0)
    filled, text = bank(4), torch.zeros(4, 77, 8)
    targets = filled.stage_batch(list(filled.rows), bend, bend, text, text, 0.0, 1, need_guided=True)
    predicted = torch.randn_like(targets.x_t)
    config = SunTrainConfig(cfg_weight=0.2, msc_weight=2.0, huber_c=huber_c, msc_error=msc_error)
    losses = weighted(config, lambda *_: predicted, targets, text, text, SCHEDULE)

    def rows(target: Tensor) -> Tensor:
        d = predicted - target
        error = 2 * huber_c * ((d**2 + huber_c**2).sqrt() - huber_c) if huber_c else d**2
        return error.mean((1, 2, 3))

    scales = state_weights(config, targets.t, SCHEDULE) if msc_error == "state" else torch.ones(4)
    total = 0.2 * rows(targets.e_cfg).mean() + 2.0 * (scales * rows(targets.e_step)).mean()
    torch.testing.assert_close(losses["total"], total)
    torch.testing.assert_close(losses["msc"], (predicted - targets.e_step).square().mean())
    torch.testing.assert_close(losses["cfg"], (predicted - targets.e_cfg).square().mean())


def test_a_student_that_equals_a_straight_teacher_has_no_distance() -> None:
    def straight(x: Tensor, *_: object) -> Tensor:
        return torch.full_like(x, 0.3)

    filled = bank(4, straight)
    rows, text = list(filled.rows), torch.zeros(4, 77, 8)
    assert filled.rollout(rows, straight, text, text) < 1e-6
    assert filled.rollout(rows, bend, text, text) > 1e-2


def test_a_bank_is_restored_from_its_state() -> None:
    filled, empty = bank(3), bank(1)
    empty.load_state_dict(filled.state_dict())
    assert [r.positive for r in empty.rows] == ["p2"]  # as many as it holds
    late = bank(3, begin=2)
    empty.load_state_dict(late.state_dict())
    assert [r.begin for r in empty.rows] == [2]
    earlier = {"rows": [row[:5] for row in filled.state_dict()["rows"]]}  # of a checkpoint that knew no beginnings
    empty.load_state_dict(earlier)
    assert [r.begin for r in empty.rows] == [0]
    for begin in (-1, 4, 1.5):
        with pytest.raises(ValueError, match="begins at"):
            empty.load_state_dict({"rows": [[*row[:5], begin] for row in filled.state_dict()["rows"]]})
    empty.load_state_dict(filled.state_dict())
    assert torch.equal(empty.rows[0].states, filled.rows[2].states)
    fresh = TrajectoryBank(4, 4, SCHEDULE, random.Random(0), torch.device("cpu"))
    fresh.load_state_dict(fresh.state_dict())
    assert not fresh.rows


def test_the_bank_keeps_the_latest_trajectories() -> None:
    filled = bank(6)
    filled.rows = type(filled.rows)(filled.rows, maxlen=4)
    assert [r.positive for r in filled.rows] == ["p2", "p3", "p4", "p5"]


@pytest.mark.parametrize(
    ("rollout", "starts", "error", "pictured"),
    [(0.0, 1.0, "noise", 0.0), (0.0, 0.5, "state", 1.0), (1.0, 1.0, "noise", 0.5)],
)
def test_training_on_trajectories(
    tiny_model: Path, pictures: Path, tmp_path: Path, rollout: float, starts: float, error: str, pictured: float
) -> None:
    run = RunConfig(output=str(tmp_path / "run"), steps=3, batch_size=3, precision="fp32", ema_decay=0.5, lr=1e-3)
    config = SunTrainConfig(
        run=run, model=str(tiny_model), data=str(pictures), substeps=2, guidance_scale=3.0, trajectories=True,
        resolution=64, replace_probability=0.5, replace_depth=3, target_reuse=2, rollout_probability=rollout,
        stage_start_probability=starts, msc_error=error, picture_starts=pictured,
    )  # fmt: skip
    adapter = sun.SunAdapter.load(train_sun(config))
    assert adapter.info.training["trajectories"] is True
    assert adapter.info.training["losses"].get("rollout" if rollout else "msc", 0) > 0


@pytest.mark.parametrize("trajectories", [True, False])
def test_an_adapter_that_takes_the_guidance_scale(
    tiny_model: Path, pictures: Path, tmp_path: Path, trajectories: bool
) -> None:
    run = RunConfig(output=str(tmp_path / "run"), steps=2, batch_size=3, precision="fp32", lr=1e-2)
    config = SunTrainConfig(
        run=run, model=str(tiny_model), data=str(pictures), substeps=2, guidance_scale=3.0, guidance_range=(1.0, 8.0),
        trajectories=trajectories, resolution=64, replace_probability=0.5, target_reuse=2,
    )  # fmt: skip
    adapter = sun.SunAdapter.load(train_sun(config))
    assert adapter.guided
    assert adapter.info.guidance_scale == 3.0
    slopes = [p for name, p in adapter.named_parameters() if name.endswith("_w")]
    assert all(p.abs().max() > 0 for p in slopes)


def test_a_fixed_adapter_is_trained_on_to_take_the_guidance_scale(
    tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    settings = {"model": str(tiny_model), "data": str(pictures), "substeps": 2, "resolution": 64}
    fixed, guided = (
        RunConfig(output=str(tmp_path / name), steps=2, batch_size=3, precision="fp32", lr=1e-2) for name in "ab"
    )
    first = train_sun(SunTrainConfig(run=fixed, guidance_scale=3.0, **settings))
    on = {**settings, "init_adapter": str(first), "guidance_scale": 3.0, "guidance_range": (1.0, 8.0)}
    second = train_sun(SunTrainConfig(run=guided, **on))
    adapter = sun.SunAdapter.load(second)
    assert adapter.guided
    assert (adapter.info.guidance_scale, adapter.guidance_range) == (3.0, (1.0, 8.0))
    assert adapter.info.training["from"] == sun.SunAdapter.load(first).info.training
    card = ship_adapter(tmp_path / "b", tmp_path / "shipped.safetensors", "Notes.").with_suffix(".md").read_text()
    plain, on_top = card.index("configs/emoji-sun.toml"), card.index("configs/emoji-sun-guided.toml")
    assert plain < on_top
    assert "by default, takes others (trained from 1 to 8)" in card
    third = RunConfig(output=str(tmp_path / "d"), steps=1, batch_size=3, precision="fp32", lr=0.0)
    moved = sun.SunAdapter.load(
        train_sun(SunTrainConfig(run=third, **{**on, "init_adapter": str(second), "guidance_scale": 2.0}))
    )
    assert moved.info.guidance_scale == 2.0, "others are counted from the scale it is trained for now"
    for w in (1.0, 2.0, 5.0):
        before, after = (
            each.layers[0].factor("alpha_neg", each.guidance(torch.tensor([w]))) for each in (adapter, moved)
        )
        assert torch.allclose(before, after, atol=2e-3), "and at every scale it is what it was"
    back = {**on, "init_adapter": str(second), "guidance_range": (0.0, 0.0)}
    with pytest.raises(ConfigError, match="init_adapter takes the guidance scale: set guidance_range"):
        train_sun(SunTrainConfig(run=RunConfig(output=str(tmp_path / "c"), steps=1), **back))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"rollout_probability": 0.5}, "only acts with trajectories = true"),
        ({"replace_depth": 2}, "only acts with trajectories = true"),
        ({"teacher_solver": "ddim"}, "only acts with trajectories = true"),
        ({"trajectories": True, "pure_noise_at_start": True}, "only acts with trajectories = false"),
        ({"trajectories": True, "stage_length": 0.3}, "1 over a whole number"),
        ({"trajectories": True, "rollout_probability": 2.0}, "from 0 to 1"),
        ({"picture_starts": 0.5}, "only acts with trajectories = true"),
        ({"trajectories": True, "picture_starts": -0.5}, "from 0 to 1"),
        ({"negative_weight": 2.0}, "only acts with trajectories = true"),
        ({"trajectories": True, "negative_weight": -1.0}, "is 0 or above"),
        ({"trajectories": True, "negative_weight": 1.0, "bank_size": 99}, "bank_size is even"),
        ({"trajectories": True, "negative_weight": 1.0, "run": RunConfig(output="x", batch_size=3)}, "size is even"),
        ({"empty_captions": 7.0}, "from 0 to 1"),
        ({"max_negative_phrases": -1}, "at least 1"),
        ({"resolution": 500}, "multiple of 8"),
        ({"guidance_scale": 0.0}, "above 0"),
    ],
)
def test_settings_that_do_nothing_or_cannot_be_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        check_settings(SunTrainConfig(**values))


@pytest.mark.parametrize("name", ["emoji-sun", "emoji-sun-guided", "emoji-sun-several", "emoji-sun-paper"])
def test_the_recipes_in_the_repository_are_allowed(name: str) -> None:
    values = read_config(Path(__file__).parents[2] / "configs" / f"{name}.toml")
    check_settings(apply(SunTrainConfig(), values))


@pytest.mark.parametrize(("file", "count"), [("ablations-emoji", 6), ("pictures-emoji", 2)])
def test_the_variants_in_the_repository_are_allowed(file: str, count: int) -> None:
    variants = variant_configs(read_config(Path(__file__).parents[2] / "configs" / f"{file}.toml"))
    assert len(variants) == count
    for config in variants.values():
        check_settings(config)


def test_the_file_says_what_the_adapter_is_that_training_went_on_from(
    tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    from_unet(unet, positive=False, alpha=0.5).save(tmp_path / "first.safetensors")
    run = RunConfig(output=str(tmp_path / "run"), steps=1, batch_size=2, precision="fp32")
    path = train_sun(
        SunTrainConfig(
            run=run, model=str(tiny_model), data=str(pictures), substeps=1, resolution=64,
            init_adapter=str(tmp_path / "first.safetensors"),
        )
    )  # fmt: skip
    assert sun.SunAdapter.load(path).info.training["positive_branch"] is False


@pytest.fixture
def fine_tune(tiny_model: Path, tmp_path: Path) -> Path:
    """Another U-Net for the tiny model."""
    unet = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    unet.save_pretrained(tmp_path / "fine-tune" / "unet")
    return tmp_path / "fine-tune"


def test_fine_tunes_take_turns_with_the_base(tiny_model: Path, fine_tune: Path, tmp_path: Path) -> None:
    unet, other = (UNet2DConditionModel.from_pretrained(f, subfolder="unet") for f in (tiny_model, fine_tune))
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([999, 249]), torch.randn(2, 5, 32)
    with torch.no_grad():
        base, tuned = unet(*inputs).sample, other(*inputs).sample
        models = FrozenModels(unet, [str(fine_tune)])
        assert [models.turn(step, 2) for step in range(7)] == [0, 0, 1, 1, 0, 0, 1]
        for index, expected in ((1, tuned), (0, base), (1, tuned), (0, base)):
            models.use(index)
            assert torch.equal(unet(*inputs).sample, expected)
    with pytest.raises(ConfigError, match="nowhere is not a diffusers folder"):
        FrozenModels(unet, [str(tmp_path / "nowhere")])
    UNet2DConditionModel(
        sample_size=4, block_out_channels=(32, 64, 32, 32), cross_attention_dim=32, attention_head_dim=2,
        layers_per_block=1,
    ).save_pretrained(tmp_path / "wide" / "unet")  # fmt: skip
    with pytest.raises(ConfigError, match="wide has other layers than the base's"):
        FrozenModels(unet, [str(tmp_path / "wide")])
    (fine_tune / "scheduler").mkdir()
    (fine_tune / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    with pytest.raises(ConfigError, match="fine-tune predicts 'v_prediction'"):
        FrozenModels(unet, [str(fine_tune)])


def test_training_on_a_fine_tune_too(
    tiny_model: Path, fine_tune: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each walks and answers its own trajectories; a run that was stopped ends with the same weights."""
    seen: list[int] = []
    use = FrozenModels.use
    monkeypatch.setattr(FrozenModels, "use", lambda self, index: (seen.append(index), use(self, index))[1])

    def train(name: str, steps: int, **settings: object) -> dict[str, torch.Tensor]:
        run = RunConfig(output=str(tmp_path / name), steps=steps, batch_size=2, precision="fp32", lr=1e-2)
        config = SunTrainConfig(
            run=run, model=str(tiny_model), data=str(pictures), substeps=2, resolution=64, trajectories=True,
            target_reuse=2, bank_size=4, **settings,
        )  # fmt: skip
        return sun.SunAdapter.load(train_sun(config)).state_dict()

    both = {"fine_tunes": (str(fine_tune),)}
    whole = train("whole", 5, **both)
    header = sun.SunAdapter.load(tmp_path / "whole" / "adapter.safetensors").info.training
    assert header["fine_tunes"] == ["fine-tune"]
    assert seen == [0, 0, 0, 0, 1, 0, 1, 0, 0, 0]  # each step ends with the base's weights, for samples
    assert not torch.equal(train("alone", 5)["layers.0.alpha_neg"], whole["layers.0.alpha_neg"])
    train("parts", 3, **both)
    again = train("parts", 5, **both)
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, msg=name)
    with pytest.raises(ConfigError, match="fine_tunes needs trajectories"):
        check_settings(SunTrainConfig(fine_tunes=("a",)))


def test_an_unknown_error_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="msc_error is noise or state"):
        train_sun(SunTrainConfig(model=str(tiny_model), msc_error="pixels"))
    with pytest.raises(ConfigError, match="huber_c is 0"):
        train_sun(SunTrainConfig(model=str(tiny_model), huber_c=-0.1))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("teacher_solver", ("euler",)), ("stage_length", (0.0, 1.5, float("nan"))), ("substeps", (0,)),
     ("target_reuse", (0,)), ("replace_depth", (0,)), ("replace_probability", (-0.1, 1.1)),
     ("stage_start_probability", (-0.1, 1.1))],
)  # fmt: skip
def test_a_setting_out_of_its_range_is_refused_by_name(name: str, wrong: tuple[object, ...]) -> None:
    for value in wrong:
        with pytest.raises(ConfigError, match=name):
            check_settings(SunTrainConfig(**{name: value}))


def test_the_ends_of_the_ranges_are_allowed() -> None:
    check_settings(SunTrainConfig(stage_length=1.0, substeps=1, replace_probability=0.0, stage_start_probability=1.0))


def test_a_learning_rate_schedule_is_one_of_two(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lr_schedule is constant or cosine, not 'cosin'"):
        TrainingRun(RunConfig(output=str(tmp_path / "run"), lr_schedule="cosin"), {})
    assert not list(tmp_path.iterdir())


def test_a_guidance_range_must_hold_the_scale(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    config = SunTrainConfig(model=str(tiny_model), guidance_scale=9.0, guidance_range=(1.0, 8.0))
    with pytest.raises(ConfigError, match="guidance_range"):
        train_sun(config)
