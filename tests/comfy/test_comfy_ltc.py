"""LTC-Accel in ComfyUI's sampling."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfy_helpers import relative


@pytest.fixture(scope="module")
def models(short: SimpleNamespace) -> SimpleNamespace:
    return short


@pytest.fixture
def apply(host: SimpleNamespace, emoji: SimpleNamespace):
    """By the paper, with steps chosen by position."""

    def make(model=None, tau: float = 0.0, every: int = 2, calibration: str = "automatic"):
        return (
            host.nodes["SUN_ApplyLtcAccel"]
            .execute(model or emoji.model, "paper", -1, -1, tau, every, calibration)
            .result[0]
        )

    return make


def watched(model):
    """The model with the latents of each of the sampler's calls written down; wrappers added later are inside."""
    from comfy.patcher_extension import WrappersMP

    seen: list[torch.Tensor] = []

    def watch(executor, x, *args):
        seen.append(x.clone())
        return executor(x, *args)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", watch)
    return model, seen


@pytest.mark.parametrize("name", ["dpmpp_2m", "uni_pc", "euler_ancestral", "heun"])
def test_the_first_picture_takes_13_of_20_calls_with_any_sampler(
    host: SimpleNamespace,
    models: SimpleNamespace,
    shipped: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """KSampler's default number of steps; how near the picture is, on a model that was trained."""
    drawn_with = shipped if name == "dpmpp_2m" else models
    run, emoji = drawn_with.run, drawn_with.emoji
    told: list[tuple[str, dict]] = []
    monkeypatch.setattr(host.part("nodes.notices"), "tell", lambda node, text, **values: told.append((text, values)))
    model = host.nodes["SUN_ApplyLtcAccel"].execute(emoji.model, "balanced").result[0]
    with run.count(model) as counts:
        fast = run.ksampler(model, steps=20, name=name, cfg=1.0)
    calls, steps = (25, 39) if name == "heun" else (13, 20)
    assert counts.unet == calls
    assert told == [("ltc_saved", {"calls": calls, "steps": steps, "saved": 36 if name == "heun" else 35})]
    assert bool(fast.isfinite().all())
    assert not host.part("nodes.ltc_patch").tables_folder().exists()  # nothing is measured
    if name == "dpmpp_2m":
        plain = run.ksampler(emoji.model, steps=20, name=name, cfg=1.0)
        assert 0 < (fast - plain).norm() < 0.1 * plain.norm()


def test_settings_of_the_paper_beside_another_preset_are_said_to_do_nothing(
    host: SimpleNamespace, run: SimpleNamespace, emoji: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, dict]] = []
    monkeypatch.setattr(host.part("nodes.notices"), "tell", lambda node, text, **values: told.append((text, values)))
    for given in ({"tau": 0.2, "every": 3}, {}):
        model = host.nodes["SUN_ApplyLtcAccel"].execute(emoji.model, "balanced", **given).result[0]
        run.ksampler(model, steps=8, cfg=1.0)
    (first, values), (second, _) = told
    assert (first, values["unused"], second) == ("ltc_unused", "tau, every", "ltc_saved")


def test_samplers_that_no_forecast_suits_run_in_full_and_say_why(
    host: SimpleNamespace, run: SimpleNamespace, emoji: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    model = host.nodes["SUN_ApplyLtcAccel"].execute(emoji.model, "fast").result[0]
    plain = run.ksampler(emoji.model, steps=8, name="euler_cfg_pp", cfg=1.0)
    assert torch.equal(run.ksampler(model, steps=8, name="euler_cfg_pp", cfg=1.0), plain)
    assert "asks for the negative prompt's answer besides" in caplog.text


def test_a_prompt_that_ends_in_the_middle_is_a_real_step(
    host: SimpleNamespace, run: SimpleNamespace, emoji: SimpleNamespace
) -> None:
    """Prompt scheduling: no forecast carries the first prompt into the second's part."""
    model = host.nodes["SUN_ApplyLtcAccel"].execute(emoji.model, "balanced").result[0]
    set_range, combine = (host.nodes[name]() for name in ("ConditioningSetTimestepRange", "ConditioningCombine"))
    (first,), (then,) = set_range.set_range(run.positive, 0.0, 0.5), set_range.set_range(run.negative, 0.5, 1.0)
    (both,) = combine.combine(first, then)
    with run.count(model) as counts:
        run.ksampler(model, positive=both, steps=20, cfg=1.0)
    assert 13 < counts.unet < 20


@pytest.mark.parametrize("by", ["sampler", "negative", "apply"])
def test_where_sun_or_its_negative_begins_or_ends_to_act_a_step_runs(
    host: SimpleNamespace, run: SimpleNamespace, emoji: SimpleNamespace, by: str
) -> None:
    """By the percents of either node, or the time range of a negative that is connected to Apply SUN."""
    skipping = host.nodes["SUN_ApplyLtcAccel"].execute(emoji.model, "balanced").result[0]
    (early,) = host.nodes["ConditioningSetTimestepRange"]().set_range(run.negative, 0.0, 0.6)
    applied = {"negative": {"negative": early}, "apply": {"end_percent": 0.6}}.get(by, {})
    chosen = {"end_percent": 0.6} if by == "sampler" else {}
    counted = []
    for given, of_sampler in (({}, {}), (applied, chosen)):
        model = run.apply(skipping, **given)
        with run.count(model) as counts:
            run.sun(model, steps=20, **of_sampler)
        counted.append(counts.unet)
    assert counted[0] == 13
    assert 13 < counted[1] < 20


def test_the_paper_s_table_is_for_one_time_of_sun(run: SimpleNamespace, apply, host: SimpleNamespace) -> None:
    folder = host.part("nodes.ltc_patch").tables_folder()
    model = run.apply(apply())
    for number, end in enumerate((1.0, 0.6, 1.0, 0.6)):
        run.sun(model, steps=5, end_percent=end)
        assert len(list(folder.glob("*.json"))) == min(number + 1, 2)


def test_presets_and_a_workflow_from_before_there_were_any(host: SimpleNamespace, emoji: SimpleNamespace) -> None:
    patch, node = host.part("nodes.ltc_patch"), host.nodes["SUN_ApplyLtcAccel"]

    def settings(*args, **kwargs):
        return node.execute(emoji.model, *args, **kwargs).result[0].get_attachment(patch.KEY).settings

    ltc = host.part("sun.ltc")
    assert settings(tau=0.1, every=2, calibration="automatic") == ltc.LtcSettings() == settings("paper")
    assert settings("fast") == ltc.PRESETS["fast"]
    assert (settings("fast", 0.5, 4).first, settings("fast", 0.5, 4).last) == (0.5, 4)
    with pytest.raises(ValueError, match="no warm_up and no tail"):
        settings("paper", 0.5)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "heun", pytest.param("dpm_2", marks=pytest.mark.slow)])
def test_the_paper_s_first_run_is_plain_and_skips_go_where_they_should(
    host: SimpleNamespace, run: SimpleNamespace, emoji: SimpleNamespace, apply, name: str
) -> None:
    plain = run.ksampler(emoji.model, steps=8, name=name, cfg=3.0)
    model = apply()
    with run.count(model) as counts:
        assert torch.equal(run.ksampler(model, steps=8, name=name, cfg=3.0), plain)
    full = counts.unet
    model, seen = watched(emoji.model)
    model = apply(model)
    with run.count(model) as counts:
        fast = run.ksampler(model, steps=8, name=name, cfg=3.0)
    calls = 2 if name in ("heun", "dpm_2") else 1
    passes = full // (8 * calls - (calls - 1))  # 1 or 2, as ComfyUI batches guidance
    assert full - counts.unet == 2 * calls * passes  # steps 3 and 5
    (measured,) = host.part("nodes.ltc_patch").tables_folder().glob("*.json")
    table = host.part("sun.ltc").load_table(measured)
    starts = seen[::calls]
    for i, (c,) in table.coefficients.items():
        expected = starts[i] + c * (starts[i] - starts[i - 1])
        torch.testing.assert_close(starts[i + 1], expected, rtol=1e-4, atol=1e-4)
    assert 0 < relative(fast, plain) < 0.5


def test_a_picture_of_nan_leaves_no_table_and_the_node_says_so(
    host: SimpleNamespace,
    run: SimpleNamespace,
    emoji: SimpleNamespace,
    apply,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from comfy.patcher_extension import WrappersMP

    told: list[str] = []
    monkeypatch.setattr(host.part("nodes.notices"), "tell", lambda node, text, **values: told.append(text))
    model = apply()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", lambda executor, *args: executor(*args) * torch.nan)
    run.ksampler(model, steps=8, name="euler", cfg=3.0)
    assert told == ["ltc_real"]
    assert "keeps nothing: a picture of it holds NaN" in caplog.text
    assert not list(host.part("nodes.ltc_patch").tables_folder().glob("*.json"))


def test_order_with_sun_does_not_matter_and_the_model_is_as_before(
    run: SimpleNamespace, emoji: SimpleNamespace, apply
) -> None:
    plain = run.ksampler(emoji.model, cfg=1.0)
    results = []
    for model in (run.apply(apply()), apply(run.apply())):
        run.sun(model, steps=8)
        results.append(run.sun(model, steps=8))
    assert torch.equal(*results)
    assert relative(results[0], run.sun(run.apply(), steps=8)) > 1e-6
    assert torch.equal(run.ksampler(emoji.model, cfg=1.0), plain)


@pytest.mark.parametrize(("name", "words"), [("euler_ancestral", "fresh noise"), ("uni_pc", "does not know")])
def test_the_paper_gives_other_samplers_a_sentence(run: SimpleNamespace, apply, name: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"{words}.*Use Euler, DDIM"):
        run.ksampler(apply(), name=name)


def test_measuring_again_and_interrupts(host: SimpleNamespace, run: SimpleNamespace, apply) -> None:
    folder = host.part("nodes.ltc_patch").tables_folder()

    def stop(*_, **__):
        raise InterruptedError

    model = apply()
    broken, _ = watched(model)
    broken.model_options["sampler_post_cfg_function"] = [stop]
    with pytest.raises(InterruptedError):
        run.ksampler(broken, steps=8)
    assert not list(folder.glob("*.json"))
    for _ in range(2):
        with run.count(model) as counts:
            run.ksampler(apply(calibration="measure again"), steps=8)
        assert counts.unet == 8
    with run.count(model) as counts:
        run.ksampler(model, steps=8)
    assert counts.unet == 6


def test_the_fingerprint_is_that_of_diffusers(host: SimpleNamespace, emoji: SimpleNamespace, emoji_folder) -> None:
    from diffusers import UNet2DConditionModel

    fingerprint = host.part("sun.ltc").fingerprint
    unet = UNet2DConditionModel.from_pretrained(emoji_folder / "unet")
    assert fingerprint(emoji.model.model.diffusion_model) == fingerprint(unet)


@pytest.mark.slow  # 14 runs; ltc/test_ltc_pipelines.py has the same in diffusers
def test_tables_of_runs_with_sun_and_with_loras_are_kept_apart(
    host: SimpleNamespace, run: SimpleNamespace, emoji: SimpleNamespace, apply
) -> None:
    """All at the same sampler, sigmas and cfg; each finds its own again."""
    folder = host.part("nodes.ltc_patch").tables_folder()
    for path in folder.glob("*.json"):
        path.unlink()

    def patched(scale: float, seed: int = 0):
        model, generator = emoji.model.clone(), torch.Generator().manual_seed(seed)
        key = next(k for k in model.model.state_dict() if k.endswith("attn2.to_q.weight"))
        change = torch.randn(model.model.state_dict()[key].shape, generator=generator)
        model.add_patches({key: ("diff", (change,))}, scale)
        return model

    def sun(model, **options):
        return run.ksampler(run.apply(apply(model), **options), steps=8, cfg=1.0)

    runs = [
        lambda: run.ksampler(apply(), steps=8, cfg=1.0),
        lambda: sun(emoji.model),
        lambda: sun(emoji.model, strength=0.5),
        lambda: run.ksampler(apply(patched(0.5)), steps=8, cfg=1.0),
        lambda: run.ksampler(apply(patched(0.2)), steps=8, cfg=1.0),
        lambda: run.ksampler(apply(patched(0.5, seed=1)), steps=8, cfg=1.0),
        lambda: sun(patched(0.5)),
    ]
    for again in (False, True):
        for make in runs:
            before = len(list(folder.glob("*.json")))
            make()
            assert len(list(folder.glob("*.json"))) == before + (not again)
    assert len(list(folder.glob("*.json"))) == len(runs)
