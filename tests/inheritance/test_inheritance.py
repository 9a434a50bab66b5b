"""Feature inheritance: plans, what an inherit step leaves out, and that the U-Net is as before afterwards."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from tiny import TEXT_WIDTH, make_adapter, make_unet

import sun
from sun import inheritance
from sun.inheritance import PRESETS, InheritanceError, Plan, parse_plan, places_of

TIMES = (999, 800, 600, 400, 200, 50)
ROWS = 2


@pytest.fixture(scope="module")
def unet() -> Any:
    return make_unet()


@pytest.fixture(autouse=True)
def _clean(unet: Any) -> Any:
    yield
    inheritance.detach(unet)
    assert not [m for m in unet.modules() if "forward" in vars(m)]


@torch.no_grad()
def calls(unet: Any, times: tuple[int, ...] = TIMES, **more: Any) -> list[torch.Tensor]:
    """The U-Net's output for changing latents, called as a sampler does."""
    torch.manual_seed(1)
    text = torch.randn(ROWS, 5, TEXT_WIDTH)
    x = torch.randn(ROWS, 4, 8, 8)
    drift = torch.randn(ROWS, 4, 8, 8)
    return [unet(x + 0.1 * i * drift, t, text, **more).sample for i, t in enumerate(times)]


# --------------------------------------------------------------------------------------------------------------- plans


def test_plans_read_what_they_print() -> None:
    for text in ("stages=1 every=3", "outer=2 mode=dense-early power=1.8", "layers=up.3.0,up.3.1 keys=0,2,5",
                 "units=up.3.2.self forecast=0.5"):  # fmt: skip
        plan = parse_plan(text)
        assert parse_plan(str(plan)) == plan
    assert parse_plan("fast") == PRESETS["fast"]
    assert parse_plan("balanced outer=2") == replace(PRESETS["balanced"], outer=2)
    assert parse_plan("balanced stages=1") == replace(PRESETS["balanced"], outer=0, stages=1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names what to leave out"),
        ("quick", "no part of a plan.*fine, balanced, fast"),
        ("stages=1 outer=2", "not both"),
        ("stages=1 every=1", "every step would be a full one"),
        ("stages=x", "takes numbers"),
        ("stages=1 mode=often", "uniform, dense-early, dense-late"),
        ("stages=1 forecast=nan", "finite numbers"),
        ("stages=1 mode=dense-early power=inf", "finite numbers"),
    ],
)
def test_wrong_plans_say_what_is_right(text: str, words: str) -> None:
    with pytest.raises(InheritanceError, match=words):
        parse_plan(text)


def test_key_steps() -> None:
    assert Plan(stages=1, every=3).key_steps(10) == (0, 3, 6, 9)
    assert Plan(stages=1, keys=(2, 5)).key_steps(10) == (0, 2, 5)
    early = Plan(stages=1, every=3, mode="dense-early", power=2.0).key_steps(20)
    late = Plan(stages=1, every=3, mode="dense-late", power=2.0).key_steps(20)
    assert early[0] == late[0] == 0
    gaps = [b - a for a, b in itertools.pairwise(early)]
    assert gaps == sorted(gaps)
    assert gaps[0] < gaps[-1]
    gaps = [b - a for a, b in itertools.pairwise(late[1:])]
    assert gaps == sorted(gaps, reverse=True)
    with pytest.raises(InheritanceError, match="number of steps"):
        Plan(stages=1, mode="dense-early").is_key(1)


def test_plans_are_checked_against_the_unet(unet: Any) -> None:
    for plan, words in (
        ("stages=4", "has 4 stages.*Use 1 to 3"),
        ("outer=12", "has 12 blocks.*Use 1 to 11"),
        ("layers=up.9.0", "no layer up.9.0.*down.0.0"),
        ("units=up.3.0.nose", "no unit.*down.0.0.resnet"),
    ):
        with pytest.raises(InheritanceError, match=words):
            inheritance.attach(unet, plan)
    with pytest.raises(InheritanceError, match="LTC-Accel"):
        inheritance.attach(torch.nn.Linear(2, 2))
    assert places_of(unet).stage_ends == (3, 6, 9, 12)


# ------------------------------------------------------------------------------------------------------------ the core


@pytest.mark.parametrize(("outer", "branch"), [(1, 0), (2, 1), (3, 2), (5, 4)])
def test_the_outer_level_is_deepcache(unet: Any, outer: int, branch: int) -> None:
    """Against the package DeepCache, whose branches are counted from 0."""
    helper_class = pytest.importorskip("DeepCache").DeepCacheSDHelper
    inheritance.attach(unet, Plan(outer=outer, every=3))
    ours = calls(unet)
    inheritance.detach(unet)
    theirs_unet = make_unet()
    times = torch.tensor(TIMES)
    helper = helper_class(pipe=SimpleNamespace(unet=theirs_unet, scheduler=SimpleNamespace(timesteps=times)))
    helper.set_params(cache_interval=3, cache_branch_id=branch)
    helper.enable()
    theirs = calls(theirs_unet, tuple(times))  # type: ignore[arg-type]
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "plan",
    ["stages=1", "stages=2", "outer=1", "outer=4", "layers=down.1.0,mid_free", "layers=up.3.1,up.3.2",
     "units=up.3.0.resnet,down.0.1.attention", "units=up.3.0.self,up.3.1.cross,down.0.0.feedforward"],
)  # fmt: skip
def test_key_steps_are_full_and_equal_inputs_inherit_exactly(unet: Any, plan: str) -> None:
    plan = plan.replace(",mid_free", ",down.3.1")
    plain = calls(unet)
    inheritance.attach(unet, plan)
    ours = calls(unet)
    for i, (a, b) in enumerate(zip(ours, plain, strict=True)):
        assert torch.equal(a, b) == (i % 2 == 0)
        torch.testing.assert_close(a, b, rtol=0.5, atol=0.5)
    with torch.no_grad():  # where nothing changed but the name of the time, what is inherited is what would come out
        torch.manual_seed(2)
        x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, TEXT_WIDTH)
        full = unet(x, 900, text).sample
        unet.get_time_embed, original = lambda sample, timestep: original(sample, 900), unet.get_time_embed
        try:
            inherited = unet(x, 899, text).sample
        finally:
            del unet.get_time_embed
    torch.testing.assert_close(inherited, full, rtol=1e-4, atol=1e-5)


def test_an_inherit_step_runs_the_outer_parts_alone(unet: Any) -> None:
    seen: list[str] = []
    handles = [m.register_forward_hook(lambda *_, name=n: seen.append(name))
               for n, m in unet.named_modules() if n.endswith(".conv1")]  # fmt: skip
    inheritance.attach(unet, "stages=1")
    calls(unet, TIMES[:1])
    assert len(seen) == 22
    seen.clear()
    calls(unet, TIMES[:2])  # the time rises: a new run
    for handle in handles:
        handle.remove()
    assert seen[22:] == [f"{s}.resnets.{i}.conv1" for s, n in (("down_blocks.0", 2), ("up_blocks.3", 3))
                         for i in range(n)]  # fmt: skip


def test_forecast_follows_a_change_that_goes_on(unet: Any) -> None:
    """Over latents that drift evenly, carrying the change on is nearer than standing still."""
    times = (500, 499, 498, 497, 496, 495)
    plain = calls(unet, times)

    def error(plan: str) -> float:
        inheritance.attach(unet, plan)
        return sum(float((a - b).square().mean()) for a, b in zip(calls(unet, times)[3:], plain[3:], strict=True))

    assert error("stages=1 forecast=1") < error("stages=1")


def test_rows_are_kept_apart_and_a_new_shape_is_full(unet: Any) -> None:
    """Two calls for each time, as samplers do that run guidance in two passes."""
    torch.manual_seed(3)
    texts = torch.randn(2, 1, 5, TEXT_WIDTH)
    x = torch.randn(1, 4, 8, 8)
    inheritance.attach(unet, "stages=1")
    with torch.no_grad():
        both = [[unet(x, t, text).sample for text in texts] for t in TIMES[:2]]
        for i, text in enumerate(texts):
            alone = [unet(x, t, text).sample for t in TIMES[:2]]
            assert torch.equal(alone[1], both[1][i])
        inheritance.detach(unet)
        wide = torch.randn(1, 4, 8, 16)
        full = unet(wide, TIMES[1], texts[0]).sample
        inheritance.attach(unet, "stages=1")
        unet(x, TIMES[0], texts[0])
        assert torch.equal(unet(wide, TIMES[1], texts[0]).sample, full)


def test_a_failing_call_leaves_nothing(unet: Any) -> None:
    inheritance.attach(unet, "stages=1")
    with pytest.raises(RuntimeError):
        unet(torch.randn(1, 4, 8, 8), 999, torch.randn(1, 5, TEXT_WIDTH + 1))
    assert not [m for m in unet.modules() if "forward" in vars(m)]


@pytest.mark.parametrize("again", [False, True])
def test_detaching_or_attaching_again_ends_an_interrupted_call(unet: Any, again: bool) -> None:
    plain = calls(unet)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    inheritance.attach(unet, "stages=1 every=2")
    calls(unet, TIMES[:1])
    hook = unet.conv_out.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        calls(unet, TIMES[1:2])
    hook.remove()
    if again:
        inheritance.attach(unet, "stages=1 every=2")
    else:
        inheritance.detach(unet)
    assert not [m for m in unet.modules() if "forward" in vars(m)]
    inheritance.detach(unet)
    assert all(torch.equal(a, b) for a, b in zip(calls(unet), plain, strict=True))


# ----------------------------------------------------------------------------------------------------------- pipelines


def draw(pipe: Any, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return pipe("a b", negative_prompt="c", num_inference_steps=6, generator=generator, output_type="latent",
                **options).images  # fmt: skip


def test_a_pipeline_reports_and_restores(make_pipeline: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    pipe = make_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    plain, own_class = draw(pipe), type(pipe)
    inheritance.attach(pipe, "balanced mode=dense-early")
    with caplog.at_level("INFO"):
        first, second = draw(pipe), draw(pipe)
    assert torch.equal(first, second)  # nothing of a run reaches the next
    assert not torch.equal(first, plain)
    assert "inherited U-Net calls" in caplog.text
    assert "MB of features kept" in caplog.text
    inheritance.detach(pipe)
    assert type(pipe) is own_class
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda pipe: pipe("a", num_inference_steps=6, output_type="latent"), 6),
        (lambda pipe: pipe("a", None, None, 7, output_type="latent"), 7),  # by position
        (lambda pipe: pipe("a", output_type="latent"), 50),  # the default, not what the last run had
    ],
)
def test_a_run_knows_its_steps(make_pipeline: Callable[..., Any], call: Callable[[Any], Any], expected: int) -> None:
    pipe = make_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    inheritance.attach(pipe, "balanced mode=dense-early", steps=3)
    draw(pipe)
    call(pipe)
    assert inheritance.run_of(pipe).steps == expected


def test_image_to_image_plans_for_the_steps_it_runs(make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline(StableDiffusionImg2ImgPipeline)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    inheritance.attach(pipe, "balanced mode=dense-late")
    pipe("a", image=Image.new("RGB", (64, 64)), strength=0.5, num_inference_steps=8, output_type="latent")
    assert inheritance.run_of(pipe).steps == 4


def test_with_sun_and_ltc_in_any_order(make_pipeline: Callable[..., Any]) -> None:
    results = []
    for order in (("sun", "inherit", "ltc"), ("ltc", "inherit", "sun"), ("inherit", "ltc", "sun")):
        pipe = make_pipeline()
        own_class = type(pipe)
        for who in order:
            if who == "sun":
                sun.attach(pipe, make_adapter(pipe.unet))
            elif who == "ltc":
                sun.ltc.attach(pipe, settings=sun.ltc.LtcSettings(tau=0)) if "sun" in order[: order.index(who)] else (
                    setattr(pipe, "scheduler", DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)),
                    sun.ltc.attach(pipe, settings=sun.ltc.LtcSettings(tau=0)),
                )
            else:
                inheritance.attach(pipe, "stages=1")
        draw(pipe)
        results.append(draw(pipe))
        for who in order:
            {"sun": sun.detach, "ltc": sun.ltc.detach, "inherit": inheritance.detach}[who](pipe)
        assert type(pipe) is own_class
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_steps_that_ltc_skips_are_not_counted(make_pipeline: Callable[..., Any], caplog: Any) -> None:
    pipe = make_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    inheritance.attach(pipe, "stages=1")
    sun.ltc.attach(pipe, settings=sun.ltc.LtcSettings(tau=0))
    draw(pipe)
    with caplog.at_level("INFO"):
        draw(pipe)
    assert "3 full and 2 inherited U-Net calls" in caplog.text  # step 3 of 6 is skipped


def test_control_residuals_are_respected(make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline(StableDiffusionControlNetPipeline)
    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    plain = draw(pipe, image=picture)
    inheritance.attach(pipe, "stages=1")
    ours = draw(pipe, image=picture)
    other = draw(pipe, image=picture, controlnet_conditioning_scale=0.5)
    assert ours.isfinite().all()
    assert (ours - plain).abs().max() < plain.abs().max()
    assert not torch.equal(ours, other)


@pytest.mark.parametrize("leaves_first", [0, 1])
def test_pipelines_that_share_a_unet_keep_their_plans(make_pipeline: Callable[..., Any], leaves_first: int) -> None:
    pipe = make_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    plain, alone = draw(pipe), []
    for plan in ("stages=1 every=2", "outer=2 every=3"):
        inheritance.attach(pipe, plan)
        alone.append(draw(pipe))
        inheritance.detach(pipe)
    assert not torch.equal(*alone)
    pipes = (pipe, other)
    for target, plan in zip(pipes, ("stages=1 every=2", "outer=2 every=3"), strict=True):
        inheritance.attach(target, plan)
    assert torch.equal(draw(pipe), alone[0])
    assert torch.equal(draw(other), alone[1])
    assert inheritance.run_of(pipe) is not inheritance.run_of(other)
    first, second = pipes[leaves_first], pipes[1 - leaves_first]
    inheritance.detach(first)
    assert torch.equal(draw(first), plain)
    assert torch.equal(draw(second), alone[1 - leaves_first])
    inheritance.detach(second)
    assert not hasattr(pipe.unet, "_inheritance")
    assert torch.equal(draw(second), plain)


def test_a_unet_detached_under_a_pipeline_is_noticed(make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline()
    inheritance.attach(pipe, "stages=1")
    inheritance.detach(pipe.unet)
    with pytest.raises(InheritanceError, match="replaced or detached"):
        draw(pipe)
    inheritance.attach(pipe, "stages=1")
    draw(pipe)


def test_a_broken_run_of_a_pipeline_leaves_nothing(make_pipeline: Callable[..., Any]) -> None:
    """Broken off inside the U-Net, where torch runs no hooks afterwards."""
    pipe = make_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    inheritance.attach(pipe, "stages=1")
    expected = draw(pipe)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = pipe.unet.mid_block.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe)
    handle.remove()
    assert not [m for m in pipe.unet.modules() if "forward" in vars(m)]
    assert torch.equal(draw(pipe), expected)


@torch.no_grad()
def test_residuals_of_a_t2i_adapter_make_a_full_call_by_position_too(unet: Any) -> None:
    names = list(inspect.signature(type(unet).forward).parameters)[1:]
    torch.manual_seed(0)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, TEXT_WIDTH)
    residuals = [torch.zeros(1, c, s, s) for c, s in ((8, 8), (16, 4), (24, 2), (24, 1))]
    given = {"sample": x, "encoder_hidden_states": text, "down_intrablock_additional_residuals": residuals}
    inheritance.attach(unet, "stages=1")
    for by_position in (False, True):
        run = None
        for t in (900, 600):
            values = {**given, "timestep": t, "down_intrablock_additional_residuals": list(residuals)}
            if by_position:
                last = names.index("down_intrablock_additional_residuals") + 1
                unet(*[values.get(name, True if name == "return_dict" else None) for name in names[:last]])
            else:
                unet(**values)
            run = inheritance.run_of(unet)
        assert run is not None
        assert run.inherited == 0
