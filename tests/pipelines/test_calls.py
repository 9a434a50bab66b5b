"""What belongs to a call of an attached pipeline stays with that call: threads, shared U-Nets, arguments by position,
pipelines that leave SUN out, and other code around the same U-Net."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from tiny import make_adapter, make_short_unet

import sun
from sun import inheritance
from sun.common.notes import SunWarning
from sun.pipelines.schedulers import TrailingDDIMScheduler
from sun.surgery import from_unet

ASKED = [("a cat", "a dog", 1), ("a tree", "blue", 2), ("red", "", 3)]


@pytest.fixture(scope="session")
def make_pipeline(make_short_pipeline: Callable[..., Any]) -> Callable[..., Any]:
    return make_short_pipeline


@pytest.fixture
def unet() -> Any:
    return make_short_unet()


def draw(
    pipe: Any, prompt: str = "a cat", negative: str = "a dog", seed: int = 1, steps: int = 4, **options: Any
) -> Any:
    return pipe(prompt, negative_prompt=negative, num_inference_steps=steps, output_type="latent",
                generator=torch.Generator().manual_seed(seed), **options).images  # fmt: skip


def in_threads(calls: list[Callable[[], Any]], rounds: int = 3) -> list[list[Any]]:
    """The results of each call, made again and again in a thread of its own while the others run."""
    ready = threading.Barrier(len(calls))

    def go(call: Callable[[], Any]) -> list[Any]:
        ready.wait()
        return [call() for _ in range(rounds)]

    with ThreadPoolExecutor(len(calls)) as pool:
        return [done.result() for done in [pool.submit(go, call) for call in calls]]


def with_sun(pipe: Any) -> None:
    sun.attach(pipe, make_adapter(pipe.unet))


def with_ltc(pipe: Any) -> None:
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    sun.ltc.attach(pipe, settings=sun.ltc.LtcSettings(tau=0))
    draw(pipe, steps=8)  # measures


def with_inheritance(pipe: Any) -> None:
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    inheritance.attach(pipe, "stages=1")


def with_all(pipe: Any) -> None:
    with_sun(pipe)
    inheritance.attach(pipe, "stages=1")
    sun.ltc.attach(pipe, settings=sun.ltc.LtcSettings(tau=0))
    draw(pipe, steps=8)


@pytest.mark.parametrize("attach", [with_sun, with_ltc, with_inheritance, with_all])
def test_threads_get_their_own_pictures_from_one_pipeline(make_pipeline: Any, attach: Callable[[Any], None]) -> None:
    pipe = make_pipeline()
    attach(pipe)
    calls = [lambda asked=asked: draw(pipe, *asked, steps=8) for asked in ASKED]
    alone = [call() for call in calls]
    for mine, expected in zip(in_threads(calls), alone, strict=True):
        assert all(torch.equal(picture, expected) for picture in mine)
    assert not [m for m in pipe.unet.modules() if "forward" in vars(m)]
    assert "step" not in vars(pipe.scheduler)


def test_threads_may_ask_for_other_steps_and_scales(pipe: Any) -> None:
    adapter = from_unet(pipe.unet, alpha=0.3, w=4.0, guided=True)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("_w"):
                parameter.fill_(0.2)
    sun.attach(pipe, adapter)
    asked = [{"guidance_scale": 2.0, "steps": 3}, {"guidance_scale": 9.0, "steps": 4}, {"steps": 5}]
    calls = [lambda options=options: draw(pipe, **options) for options in asked]
    alone = [call() for call in calls]
    assert not torch.equal(alone[0], alone[1])
    for mine, expected in zip(in_threads(calls), alone, strict=True):
        assert all(torch.equal(picture, expected) for picture in mine)


def test_a_pipeline_without_a_method_is_not_drawn_into_anothers_run(make_pipeline: Any) -> None:
    """Same U-Net, another thread: features, skipped steps and negatives of the attached pipeline stay with it."""
    pipe = make_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    plain = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    plain.scheduler = copy.deepcopy(pipe.scheduler)
    plain.set_progress_bar_config(disable=True)
    expected_plain = draw(plain, steps=8)
    with_all(pipe)
    expected = draw(pipe, steps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SunWarning)
        mine, theirs = in_threads([lambda: draw(pipe, steps=8), lambda: draw(plain, steps=8)])
    assert all(torch.equal(picture, expected) for picture in mine)
    assert all(torch.equal(picture, expected_plain) for picture in theirs)


@torch.no_grad()
def test_threads_that_call_a_bare_unet_inherit_their_own_features() -> None:
    unet = make_short_unet()
    inheritance.attach(unet, "stages=1")

    noise = torch.randn(2, 1, 4, 8, 8)  # not in the threads, which share torch's generator

    def run(row: int) -> torch.Tensor:
        x, text = noise[row], torch.ones(1, 5, 16) * row
        return torch.cat([unet(x + t / 1000, t, text).sample for t in (900, 600, 300, 100)])

    alone = [run(0), run(1)]
    for mine, expected in zip(in_threads([lambda: run(0), lambda: run(1)], 4), alone, strict=True):
        assert all(torch.equal(outputs, expected) for outputs in mine)
    assert not [m for m in unet.modules() if "forward" in vars(m)]


def test_a_call_within_a_call_keeps_both_apart(pipe: Any) -> None:
    """From a callback, as previews are drawn."""
    with_sun(pipe)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe, vae=pipe.vae)
    other.set_progress_bar_config(disable=True)
    sun.attach(other, make_adapter(pipe.unet, seed=8), 0.5)
    options = {"image": torch.rand(1, 3, 64, 64), "strength": 0.5}
    expected, inner = draw(pipe), draw(other, "a tree", "blue", **options)

    def within(_pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            assert torch.equal(draw(other, "a tree", "blue", **options), inner)
        return {}

    assert torch.equal(draw(pipe, callback_on_step_end=within), expected)


# ----------------------------------------------------------------------------------------- SUN that would do nothing


class OwnLoop(StableDiffusionPipeline):
    """A community pipeline: classifier-free guidance of its own."""

    @torch.no_grad()
    def __call__(self, prompt: str, negative_prompt: str = "", guidance_scale: float = 4.0) -> torch.Tensor:
        positive, negative = self.encode_prompt(prompt, self.device, 1, True, negative_prompt)
        self.scheduler.set_timesteps(3)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        for t in self.scheduler.timesteps:
            u, c = self.unet(torch.cat([x, x]), t, torch.cat([negative, positive])).sample.chunk(2)
            x = self.scheduler.step(u + guidance_scale * (c - u), t, x).prev_sample
        return x


class Wrapping(StableDiffusionPipeline):
    """A community pipeline that calls diffusers' own loop."""

    def __call__(self, words: list[str], avoid: str) -> Any:
        return super().__call__(" ".join(words), negative_prompt=avoid, num_inference_steps=2, output_type="latent",
                                generator=torch.Generator().manual_seed(1)).images  # fmt: skip


def test_a_pipeline_whose_own_loop_leaves_sun_out_says_so(make_pipeline: Any) -> None:
    pipe = make_pipeline(OwnLoop)
    plain = pipe("a cat", "a dog")
    with_sun(pipe)
    with pytest.raises(RuntimeError, match=r"SUN did nothing in this run: OwnLoop\.__call__"):
        pipe("a cat", "a dog")
    sun.detach(pipe)
    assert torch.equal(pipe("a cat", "a dog"), plain)


def test_a_pipeline_around_diffusers_own_loop_works(make_pipeline: Any) -> None:
    pipe = make_pipeline(Wrapping)
    with_sun(pipe)
    as_usual = make_pipeline()
    sun.attach(as_usual, make_adapter(as_usual.unet))
    assert torch.equal(pipe(["a", "cat"], "a dog"), draw(as_usual, steps=2))


@pytest.mark.parametrize("make", ["from_pipe", "auto", "components"])
def test_a_pipeline_made_of_an_attached_one_says_that_it_is_not(pipe: Any, make: str) -> None:
    """It has the scheduler from before, runs guidance as ever, and is attached by itself."""
    options = {"image": torch.rand(1, 3, 64, 64), "strength": 0.5}
    parts = dict(pipe.components)
    before = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    before.set_progress_bar_config(disable=True)
    plain = draw(before, **options)
    with_sun(pipe)
    if make == "components":
        other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    else:
        maker = StableDiffusionImg2ImgPipeline if make == "from_pipe" else AutoPipelineForImage2Image
        other = maker.from_pipe(pipe, vae=pipe.vae)
    other.set_progress_bar_config(disable=True)
    assert type(other.scheduler) is type(before.scheduler)
    with pytest.warns(SunWarning, match="SUN did nothing in this call"):
        assert torch.equal(draw(other, **options), plain)
    sun.attach(other, make_adapter(pipe.unet))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SunWarning)
        assert not torch.equal(draw(other, **options), plain)
        draw(pipe)
    sun.detach(other)
    assert type(other.scheduler) is type(before.scheduler)
    sun.detach(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SunWarning)
        assert torch.equal(draw(other, **options), plain)


def test_plain_calls_of_a_unet_that_was_attached_itself_are_as_documented(unet: Any) -> None:
    sun.attach(unet, make_adapter(unet))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SunWarning)
        unet(torch.randn(1, 4, 8, 8), 500, torch.randn(1, 5, 16))


# ------------------------------------------------------------------------------------------------------- by position


def by_position(pipe: Any, **given: Any) -> Any:
    """A call with every argument by position, up to the last one that is given."""
    names = list(inspect.signature(pipe.__call__).parameters.values())
    last = max(i for i, parameter in enumerate(names) if parameter.name in given)
    return pipe(*[given.get(p.name, p.default) for p in names[: last + 1]])


def test_a_guidance_scale_by_position_is_the_guidance_scale(pipe: Any) -> None:
    adapter = from_unet(pipe.unet, alpha=0.3, w=4.0, guided=True)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("_w"):
                parameter.fill_(0.2)
    sun.attach(pipe, adapter)
    given = {"prompt": "a", "height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 9.0,
             "output_type": "latent"}  # fmt: skip

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    named = pipe(**given, generator=generator()).images
    assert torch.equal(by_position(pipe, **given, generator=generator()).images, named)
    assert not torch.equal(pipe(**{**given, "guidance_scale": 4.0}, generator=generator()).images, named)


def test_what_is_ignored_is_told_by_position_too(pipe: Any) -> None:
    sun.attach(pipe, make_adapter(pipe.unet))
    with pytest.warns(UserWarning, match="guidance_scale is ignored"):
        by_position(pipe, prompt="a", num_inference_steps=1, guidance_scale=9.0)


# ------------------------------------------------------------------------------------- others around the same U-Net


@contextmanager
def positional(unet: Any) -> Iterator[list[int]]:
    """How many positional arguments a forward pre-hook and a wrapped forward see."""
    seen: list[int] = []
    forward = unet.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        seen.append(len(args))
        return forward(*args, **kwargs)

    unet.forward = wrapped
    handle = unet.register_forward_pre_hook(lambda _unet, args: seen.append(len(args)))
    yield seen
    handle.remove()
    del unet.forward


def test_others_see_the_arguments_as_they_were_passed(pipe: Any) -> None:
    with positional(pipe.unet) as seen:
        draw(pipe, steps=1)
        without = list(seen)
    with_sun(pipe)
    with positional(pipe.unet) as seen:
        draw(pipe, steps=1)
        assert seen == without


@torch.no_grad()
@pytest.mark.parametrize("count", [2, 3, 7, 12])
def test_options_by_position_stay_there(unet: Any, count: int) -> None:
    """However many arguments are passed by position, the output is that of all by name."""
    sun.attach(unet, make_adapter(unet))
    torch.manual_seed(0)
    x, positive, negative = torch.randn(1, 4, 8, 8), *torch.randn(2, 1, 5, 16)
    names = list(inspect.signature(type(unet).forward).parameters)[1:]
    given = {"sample": x, "timestep": 500, "encoder_hidden_states": positive,
             "cross_attention_kwargs": {"sun_negative": negative}}  # fmt: skip
    expected = unet(**given).sample
    first = [given.get(name) for name in names[:count]]
    rest = {name: value for name, value in given.items() if name not in names[:count]}
    with positional(unet) as seen:
        assert torch.equal(unet(*first, **rest).sample, expected)
        assert seen == [count, count]


@pytest.mark.parametrize("first", ["deepcache", "sun"])
def test_deepcache_before_and_after(pipe: Any, first: str) -> None:
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    if first == "deepcache":
        helper.enable()
        with_sun(pipe)
    else:
        with_sun(pipe)
        plain = draw(pipe, steps=6)
        helper.enable()
    cached, other = draw(pipe, steps=6), draw(pipe, negative="blue", steps=6)
    assert cached.isfinite().all()
    assert not torch.equal(cached, other)
    helper.disable()
    if first == "sun":
        assert not torch.equal(cached, plain)
        assert torch.equal(draw(pipe, steps=6), plain)


# --------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("attach", [with_sun, with_ltc, with_inheritance, with_all])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_of_an_attached_pipeline_is_attached_by_itself(make_pipeline: Any, attach: Any, duplicate: Any) -> None:
    pipe = make_pipeline()
    own_class = type(pipe)
    plain_scheduler = type(pipe.scheduler)
    attach(pipe)
    expected = draw(pipe, steps=8)
    other = duplicate(pipe)
    assert type(other) is type(pipe)
    assert other.unet is not pipe.unet
    assert torch.equal(draw(other, steps=8), expected)
    for leave in (sun.detach, sun.ltc.detach, inheritance.detach):
        leave(pipe)
    assert torch.equal(draw(other, steps=8), expected)  # the copy stays when the original leaves
    for leave in (sun.detach, sun.ltc.detach, inheritance.detach):
        leave(other)
    assert type(other) is own_class
    assert not hasattr(other.unet, "_sun")
    assert not hasattr(other.unet, "_inheritance")
    assert not [m for m in other.unet.modules() if m._forward_pre_hooks or m._forward_hooks]
    if attach is with_sun:
        assert type(other.scheduler) is plain_scheduler
        assert not isinstance(other.scheduler, TrailingDDIMScheduler)
