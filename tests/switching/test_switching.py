"""Switching in diffusers: which U-Net runs when, what reaches it, and that nothing is left behind."""

from __future__ import annotations

import copy
import gc
import math
import os
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from PIL import Image
from tiny import STAGES, TEXT_WIDTH, make_adapter, make_unet

import sun
import sun.inheritance
import sun.ltc
import sun.switching
from sun.common.notes import SunWarning
from sun.switching import LARGE_FIRST, SMALL_FIRST, Switching, SwitchingError, layers_a_stage, residuals_for


def make_small(seed: int = 3, **more: Any) -> Any:
    """One layer less in three stages: what an assembled U-Net looks like."""
    torch.manual_seed(seed)
    options = {"layers_per_block": (1, 1, 2, 1), "block_out_channels": STAGES, "cross_attention_dim": TEXT_WIDTH} | more
    return UNet2DConditionModel(sample_size=8, attention_head_dim=2, norm_num_groups=4, **options).eval()


@pytest.fixture(scope="module")
def small() -> Any:
    return make_small()


@pytest.fixture
def pipe(make_pipeline: Callable[..., Any]) -> Any:
    made = make_pipeline()
    made.scheduler = DPMSolverMultistepScheduler.from_config(made.scheduler.config, timestep_spacing="trailing")
    return made


def draw(pipe: Any, steps: int = 5, **options: Any) -> torch.Tensor:
    given = {"prompt": "a b", "negative_prompt": "c", "output_type": "latent", **options}
    return pipe(**given, num_inference_steps=steps, generator=torch.Generator().manual_seed(5)).images


def with_unet(pipe: Any, unet: Any) -> Any:
    """The same pipeline of another U-Net, without anything of ours."""
    sun.switching.detach(pipe)
    return type(pipe)(**{**pipe.components, "unet": unet}, requires_safety_checker=False)


def counted(*modules: Any) -> list[int]:
    """How often each module is called, from now on."""
    counts = [0] * len(modules)

    def count(i: int) -> Any:
        def hook(*_: Any) -> None:
            counts[i] += 1

        return hook

    for i, module in enumerate(modules):
        module.register_forward_pre_hook(count(i))
    return counts


# ------------------------------------------------------------------------------------------------------------ the rule


@pytest.mark.parametrize(
    ("share", "order", "ran"),
    [
        (0.4, SMALL_FIRST, "ssLLL"),
        (0.4, LARGE_FIRST, "LLLss"),
        (0.5, SMALL_FIRST, "sssLL"),  # 2.5 steps: rounded up
        (0.0, SMALL_FIRST, "LLLLL"),
        (1.0, LARGE_FIRST, "sssss"),
        (0.05, SMALL_FIRST, "LLLLL"),
    ],
)
def test_a_share_of_the_steps_is_chosen_by_level(share: float, order: str, ran: str) -> None:
    sigmas = [14.6, 6.2, 2.9, 1.1, 0.3]
    switching = Switching(share, order)
    border = switching.border(sigmas)
    assert "".join("s" if border.small(sigma) else "L" for sigma in sigmas) == ran
    assert switching.small_steps(5) == ran.count("s")
    first = next((i for i in range(1, 5) if ran[i] != ran[0]), None)
    assert switching.switches_at(5) == first


def test_a_level_between_two_steps_belongs_to_its_step() -> None:
    """DPM2 asks in the middle of a step, Heun at its end; float32 moves a level by a hair."""
    border = Switching(0.4).border([14.6, 6.2, 2.9, 1.1, 0.3])
    assert border.small(math.sqrt(6.2 * 2.9))
    assert not border.small(2.9 * (1 + 1e-6))


@pytest.mark.parametrize(
    ("share", "order", "words"),
    [(1.2, SMALL_FIRST, "from 0 to 1"), (float("nan"), SMALL_FIRST, "0 to 1"), (True, SMALL_FIRST, "0 to 1"),
     (0.4, "small", "'small first' or 'large first'")],
)  # fmt: skip
def test_settings_that_cannot_be_get_a_sentence(share: Any, order: str, words: str) -> None:
    with pytest.raises(SwitchingError, match=words):
        Switching(share, order)


def test_residuals_of_the_layers_that_are_left() -> None:
    assert residuals_for((2, 2, 2, 2), (2, 2, 2, 2)) == list(range(12))
    assert residuals_for((2, 2, 2, 2), (1, 1, 2, 1)) == [0, 1, 3, 4, 6, 7, 8, 9, 10]
    assert residuals_for((2, 2, 2, 2), (1, 1, 1)) == [0, 1, 3, 4, 6, 7]  # without the innermost stage
    with pytest.raises(SwitchingError, match="exchange the two"):
        residuals_for((1, 1, 2, 1), (2, 2, 2, 2))


# -------------------------------------------------------------------------------------------------------- in pipelines


def test_share_0_and_1_are_each_unet_alone(pipe: Any, small: Any) -> None:
    plain, alone = draw(pipe), draw(with_unet(pipe, small))
    own = type(pipe.unet)
    sun.switching.attach(pipe, small, share=0)
    assert torch.equal(draw(pipe), plain)
    sun.switching.attach(pipe, small, share=1, order=LARGE_FIRST)
    assert torch.equal(draw(pipe), alone)
    assert type(pipe.unet) is own
    sun.switching.detach(pipe)
    assert torch.equal(draw(pipe), plain)


def test_a_multistep_solver_keeps_its_history(pipe: Any, small: Any, count_calls: Callable[..., Any]) -> None:
    """Equal to a loop written by hand, in which one scheduler steps through and the U-Net is chosen by timestep."""
    sun.switching.attach(pipe, small, 0.4)
    calls = count_calls(pipe.unet), count_calls(small)
    ours = draw(pipe, guidance_scale=1.0)
    times = pipe.scheduler.timesteps.tolist()
    assert (calls[1].timesteps, calls[0].timesteps) == (times[:2], times[2:])
    run = sun.switching.last_run(pipe)
    assert (run.small_calls, run.large_calls) == (2, 3)

    scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(5)
    text = pipe.encode_prompt("a b", "cpu", 1, False)[0]
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step((small if i < 2 else pipe.unet)(x, t, text).sample, t, x).prev_sample
    assert torch.equal(ours, x)


def test_image_to_image_counts_the_steps_that_run(make_pipeline: Any, small: Any) -> None:
    pipe = make_pipeline(StableDiffusionImg2ImgPipeline)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    sun.switching.attach(pipe, small, 0.25)
    draw(pipe, 8, image=Image.new("RGB", (64, 64), "red"), strength=0.5)
    run = sun.switching.last_run(pipe)
    assert (run.small_calls, run.large_calls) == (1, 3)


def test_a_solver_of_second_order_switches_once(pipe: Any, small: Any, count_calls: Callable[..., Any]) -> None:
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    sun.switching.attach(pipe, small, 0.5)
    calls = count_calls(pipe.unet), count_calls(small)
    draw(pipe, 4)
    assert min(calls[1].timesteps) > max(calls[0].timesteps)
    assert len(set(calls[1].timesteps)) == len(set(calls[0].timesteps)) == 2


def test_a_lora_acts_on_the_unet_it_was_put_on(pipe: Any) -> None:
    small = make_small()
    sun.switching.attach(pipe, small, 0.4)
    plain = draw(pipe)
    for unet, share in ((small, 1.0), (pipe.unet, 0.0)):
        config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
        unet.add_adapter(config)
        mixed = draw(pipe)
        sun.switching.attach(pipe, small, 1 - share)
        elsewhere = draw(pipe)
        unet.disable_adapters()
        assert torch.equal(draw(pipe), elsewhere)  # the other U-Net alone knows nothing of it
        sun.switching.attach(pipe, small, 0.4)
        assert torch.equal(draw(pipe), plain)
        assert not torch.equal(mixed, plain)


def test_a_controlnet_acts_on_whichever_runs(make_pipeline: Any, small: Any) -> None:
    """Of the twelve residuals those of the layers that the small U-Net has."""
    pipe = make_pipeline(StableDiffusionControlNetPipeline)
    picture = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    drawn = {}
    for share in (0.0, 1.0):
        sun.switching.attach(pipe, small, share)
        for scale in (0.0, 1.0):
            drawn[share, scale] = draw(pipe, 2, image=picture, controlnet_conditioning_scale=scale)
        assert (drawn[share, 1.0] - drawn[share, 0.0]).abs().max() > 1e-3
    given: list[Any] = []
    handle = small.register_forward_pre_hook(lambda _m, _a, kw: given.append(kw), with_kwargs=True)
    draw(pipe, 1, image=picture)
    handle.remove()
    assert len(given[0]["down_block_additional_residuals"]) == 9
    assert layers_a_stage(small) == (1, 1, 2, 1)


def test_sun_with_an_adapter_for_each(pipe: Any, count_calls: Callable[..., Any]) -> None:
    small, adapters = make_small(), (make_adapter(pipe.unet), None)
    sun.attach(pipe, adapters[0])
    sun.switching.attach(pipe, small, 0.5)
    with pytest.raises(SwitchingError, match=r"sun\.attach\(small_unet, adapter\)"):
        draw(pipe, 4)
    sun.attach(small, make_adapter(small, seed=8))
    calls = count_calls(pipe.unet), count_calls(small)
    both = draw(pipe, 4)
    assert [len(log) for log in calls] == [2, 2]
    assert calls[0].rows == calls[1].rows == [1, 1]  # no classifier-free guidance in either
    assert not torch.equal(both, draw(pipe, 4, negative_prompt="a a a"))

    sun.switching.attach(pipe, small, 1.0)
    alone = draw(pipe, 4)
    only = with_unet(pipe, small)
    sun.attach(only, make_adapter(small, seed=8))
    assert torch.equal(draw(only, 4), alone)


def test_ltc_accel_never_repeats_the_other_unet(pipe: Any, small: Any) -> None:
    """Whatever was attached first; steps 5, 7 and 9 are skipped, and 5 is the first of the large U-Net."""
    for order in (0, 1):
        attaching = [
            lambda: sun.switching.attach(pipe, small, 5 / 12),
            lambda: sun.ltc.attach(pipe, settings=sun.ltc.LtcSettings(tau=0)),
        ]
        for attach in attaching if order else reversed(attaching):
            attach()
        calls = counted(pipe.unet.conv_out, small.conv_out)
        measured = draw(pipe, 12)
        assert calls == [7, 5]
        fast = draw(pipe, 12)
        assert calls == [7 + 5, 5 + 5]
        assert 0 < (fast - measured).abs().max() < measured.abs().max()
        sun.switching.attach(pipe, small, 0.25)  # another mixture measures itself
        draw(pipe, 12)
        assert calls == [12 + 9, 10 + 3]
        sun.ltc.detach(pipe), sun.switching.detach(pipe)


def test_ltc_accel_beside_switching_on_a_start_picture(make_pipeline: Any, small: Any) -> None:
    """Of 10 steps 8 run; of these 3 and 5 may be skipped, and 5 is the first of the large U-Net."""
    pipe = make_pipeline(StableDiffusionImg2ImgPipeline)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    sun.switching.attach(pipe, small, 0.6)
    sun.ltc.attach(pipe, guard=0)
    draw(pipe, 10, image=Image.new("RGB", (64, 64), "red"), strength=0.8)
    run = sun.switching.last_run(pipe)
    assert (run.small_calls, run.large_calls) == (5, 3)  # as asked for; step 3 was answered without a call
    assert sun.ltc.last_run(pipe) == sun.ltc.Counts(7, 8)


def test_inherited_features_are_each_unet_s_own(pipe: Any) -> None:
    small = make_small()
    sun.inheritance.attach(pipe, "stages=1")
    sun.inheritance.attach(small, "stages=1")
    sun.switching.attach(pipe, small, 0.5)
    inner = counted(pipe.unet.down_blocks[1].resnets[0].conv1, small.down_blocks[1].resnets[0].conv1)
    draw(pipe, 6)
    assert inner == [2, 2]  # key, inherit, key in each
    sun.inheritance.detach(small)


def test_an_interrupted_run_leaves_nothing_patched(pipe: Any, small: Any) -> None:
    own = type(pipe.unet)
    sun.switching.attach(pipe, small, 0.5)

    def stop(_pipe: Any, step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, callback_on_step_end=stop)
    assert type(pipe.unet) is own
    assert sun.switching.last_run(pipe).small_calls == 2


def test_detaching_lets_the_small_unet_go(pipe: Any) -> None:
    small = make_small()
    gone = weakref.ref(small)
    sun.switching.attach(pipe, small, 0.4)
    sun.switching.attach(pipe, small, 0.5)  # again: the later one takes its place
    copied = copy.deepcopy(pipe)
    drawn = draw(pipe, 4)
    assert torch.equal(draw(copied, 4), drawn)
    assert copied._switching.small is not small
    del small
    sun.switching.detach(pipe)
    gc.collect()
    assert gone() is None
    assert sun.switching.last_run(pipe).small_calls == 2


def test_pipelines_that_share_a_unet_keep_their_own(pipe: Any, small: Any) -> None:
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    other.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    plain = draw(other)
    sun.switching.attach(pipe, small, 0.4)
    mixed = draw(pipe)
    assert torch.equal(draw(other), plain)
    sun.switching.attach(other, small, 1.0)
    assert torch.equal(draw(pipe), mixed)
    seen: list[Any] = []

    def meanwhile(_pipe: Any, step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 0:  # a call within the call, as a preview would make
            seen.append(draw(other))
        return kwargs

    assert torch.equal(draw(pipe, callback_on_step_end=meanwhile), mixed)
    sun.switching.detach(other)
    assert not torch.equal(seen[0], plain)


def test_the_small_unet_may_have_another_number_format(pipe: Any, small: Any) -> None:
    half = make_small().to(torch.bfloat16)
    sun.switching.attach(pipe, half, 1.0)
    near = draw(pipe)
    sun.switching.attach(pipe, small, 1.0)
    assert near.dtype == torch.float32
    assert torch.nn.functional.mse_loss(near, draw(pipe)) < 1e-3 * near.var()


# --------------------------------------------------------------------------------------------------------- what cannot


def test_unets_that_cannot_take_turns_are_refused(pipe: Any, make_pipeline: Any, tmp_path: Any) -> None:
    for options, words in (
        ({"in_channels": 9}, "channels.*no inpainting"),
        ({"in_channels": 16, "out_channels": 16}, "takes latents of 16 channels.*the large one 4"),
        ({"cross_attention_dim": 24}, "texts 24 wide"),
        ({"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
          "projection_class_embeddings_input_dim": 64}, "SDXL and SSD-1B"),
    ):  # fmt: skip
        with pytest.raises(SwitchingError, match=words):
            sun.switching.attach(pipe, make_small(**options))
    other = make_pipeline(unet=make_small())
    other.scheduler = DPMSolverMultistepScheduler.from_config(other.scheduler.config, prediction_type="v_prediction")
    with pytest.raises(SwitchingError, match="small one predicts v, the large one the noise"):
        sun.switching.attach(pipe, other)
    other.save_pretrained(tmp_path)  # a U-Net alone is known by the folder it came from
    alone = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    with pytest.raises(SwitchingError, match="predicts v"):
        sun.switching.attach(pipe, alone)
    described = tmp_path / "scheduler" / "scheduler_config.json"
    for anything in (b"[" * 10**5, b"\xff", None):  # what it says of itself is a stranger's
        described.unlink()
        os.mkfifo(described) if anything is None else described.write_bytes(anything)
        sun.switching.attach(pipe, alone)
    sun.switching.detach(pipe)
    sun.switching.detach(pipe)
    with pytest.raises(TypeError, match="pipeline with a UNet2DConditionModel"):
        sun.switching.attach(pipe.unet, alone)
    assert type(pipe).__mro__[0].__dict__.get("_sun_layer") is None


def test_one_unet_twice_and_the_wrong_way_round_are_said(pipe: Any, small: Any, make_pipeline: Any) -> None:
    plain = draw(pipe)
    with pytest.warns(SunWarning, match="are the same one"):
        sun.switching.attach(pipe, pipe.unet)
    assert torch.equal(draw(pipe), plain)
    swapped = make_pipeline(unet=make_small())
    with pytest.warns(SunWarning, match="exchange them"):
        sun.switching.attach(swapped, make_unet())


def test_sdxl_with_a_unet_of_ssd_1b_s_kind(tokenizer_folder: Any) -> None:
    """Unequal depths of transformers, no layer in the middle's; both take SDXL's size and pooled text."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from diffusers.models import AutoencoderTiny

    def unet(depth: Any, mid: Any, seed: int) -> Any:
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16, 24), layers_per_block=2, cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=(1, 2, 2), norm_num_groups=4, use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), mid_block_type=mid,
            transformer_layers_per_block=depth, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=TEXT_WIDTH + 24,
        ).eval()  # fmt: skip

    large = unet([1, 2, 3], "UNetMidBlock2DCrossAttn", 0)
    slim = unet([1, 1, 1], "UNetMidBlock2D", 1)
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderTiny(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=large,
        scheduler=EulerDiscreteScheduler(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    sun.switching.attach(pipe, slim, 0.5)
    texts = torch.randn(2, 1, 5, TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    drawn = pipe(
        prompt_embeds=texts[0], negative_prompt_embeds=texts[1], pooled_prompt_embeds=texts[0, :, 0],
        negative_pooled_prompt_embeds=texts[1, :, 0], num_inference_steps=4, output_type="latent", height=64, width=64,
        generator=torch.Generator().manual_seed(2),
    ).images  # fmt: skip
    run = sun.switching.last_run(pipe)
    assert (run.small_calls, run.large_calls) == (2, 2)
    assert drawn.isfinite().all()
