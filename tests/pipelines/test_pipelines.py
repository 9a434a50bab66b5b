"""SUN in diffusers' pipelines: one U-Net call a step, the negative prompt works, detach restores."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from tiny import TEXT_WIDTH, make_adapter, make_short_unet

import sun
from sun import SunFileError, trailing_timesteps
from sun.pipelines.schedulers import TrailingDDIMScheduler
from sun.pipelines.unet import CURRENT
from sun.surgery import from_unet

KINDS = {
    "text": "StableDiffusionPipeline",
    "img2img": "StableDiffusionImg2ImgPipeline",
    "inpaint": "StableDiffusionInpaintPipeline",
    "controlnet": "StableDiffusionControlNetPipeline",
    "controlnet-img2img": "StableDiffusionControlNetImg2ImgPipeline",
    "controlnet-inpaint": "StableDiffusionControlNetInpaintPipeline",
}


@pytest.fixture(scope="session")
def make_pipeline(make_short_pipeline: Callable[..., Any]) -> Callable[..., Any]:
    return make_short_pipeline


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def half_mask() -> Image.Image:
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, 32:] = 255
    return Image.fromarray(mask)


def extra_inputs(kind: str, strength: float = 1.0) -> dict[str, Any]:
    """What a kind of pipeline needs besides prompts."""
    if kind == "text":
        return {}
    if kind == "controlnet":
        return {"image": picture(1)}
    extra: dict[str, Any] = {"image": picture(), "strength": strength}
    if "inpaint" in kind:
        extra["mask_image"] = half_mask()
    if "controlnet" in kind:
        extra["control_image"] = picture(1)
    return extra


def sample(pipe: Any, prompt: Any = "a cat", negative: Any = "a dog", seed: Any = 0, **kwargs: Any) -> torch.Tensor:
    """Latents of a run, two steps if not told; a list of seeds gives each image its own noise."""
    seeds = seed if isinstance(seed, list) else [seed]
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    options = {"num_inference_steps": 2, "output_type": "latent", **kwargs}
    return pipe(
        prompt, negative_prompt=negative, generator=generators if len(seeds) > 1 else generators[0], **options
    ).images


def encode(pipe: Any, texts: list[str]) -> torch.Tensor:
    ids = pipe.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]


@pytest.fixture
def sun_pipe(pipe):
    sun.attach(pipe, make_adapter(pipe.unet))
    return pipe


@pytest.mark.parametrize("kind", KINDS)
def test_every_pipeline_makes_one_unet_call_a_step(make_pipeline, count_calls, kind):
    pipe = make_pipeline(getattr(diffusers, KINDS[kind]))
    sun.attach(pipe, make_adapter(pipe.unet))
    calls = count_calls(pipe.unet)
    control = count_calls(pipe.controlnet) if "controlnet" in kind else None
    out = sample(
        pipe,
        ["a cat", "a tree"],
        ["a dog", "blue"],
        seed=[0, 1, 2, 3],
        num_images_per_prompt=2,
        num_inference_steps=4,
        **extra_inputs(kind),
    )
    assert out.shape == (4, 4, 8, 8)
    assert calls.timesteps == [999, 749, 499, 249]
    assert calls.rows == [4] * 4
    positive = encode(pipe, ["a cat", "a tree"]).repeat_interleave(2, dim=0)
    assert all(torch.equal(text, positive) for text in calls.texts)
    if control is not None:  # the positive prompt alone
        assert control.timesteps == calls.timesteps
        assert all(torch.equal(text, positive) for text in control.texts)


@pytest.mark.parametrize("kind", KINDS)
def test_every_pipeline_obeys_the_negative_prompt_image_by_image(make_pipeline, kind):
    pipe = make_pipeline(getattr(diffusers, KINDS[kind]))
    sun.attach(pipe, make_adapter(pipe.unet))
    extra = extra_inputs(kind)
    together = sample(pipe, ["a cat", "a tree"], ["a dog", "blue"], seed=[3, 4], **extra)
    first, second = sample(pipe, "a cat", "a dog", seed=3, **extra), sample(pipe, "a tree", "blue", seed=4, **extra)
    torch.testing.assert_close(together, torch.cat([first, second]), rtol=1e-3, atol=1e-3)
    assert (sample(pipe, "a cat", "blue", seed=3, **extra) - first).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["img2img", "inpaint", "controlnet-img2img", "controlnet-inpaint"])
@pytest.mark.parametrize(("strength", "timesteps"), [(0.5, [499, 249]), (0.8, [749, 499, 249]), (0.3, [249])])
def test_strength_drops_the_first_trained_timesteps(make_pipeline, count_calls, kind, strength, timesteps):
    pipe = make_pipeline(getattr(diffusers, KINDS[kind]))
    sun.attach(pipe, make_adapter(pipe.unet))
    calls = count_calls(pipe.unet)
    sample(pipe, num_inference_steps=4, **extra_inputs(kind, strength))
    assert calls.timesteps == timesteps
    assert sun.denoise_timesteps(4, strength) == timesteps


def test_a_run_is_the_loop_written_out(sun_pipe):
    """DDIM of Eq. 9 on the trailing timesteps, one call of the bare U-Net each, ending at sigma 0."""
    positive, negative = encode(sun_pipe, ["a cat"]), encode(sun_pipe, ["a dog"])
    for steps in (1, 3, 4, 6):  # 3 and 6: steps of unequal length
        x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
        times = trailing_timesteps(steps)
        cumprod = sun_pipe.scheduler.alphas_cumprod.double()
        for i, t in enumerate(times):
            with torch.no_grad():
                eps = sun_pipe.unet(x, t, positive, cross_attention_kwargs={"sun_negative": negative}).sample
            a, s = cumprod[t].sqrt(), (1 - cumprod[t]).sqrt()
            last = i == len(times) - 1
            after = cumprod[times[i + 1]] if not last else torch.ones(())
            x = (after.sqrt() * (x - s * eps) / a + (1 - after).sqrt() * eps).float()
        torch.testing.assert_close(sample(sun_pipe, num_inference_steps=steps), x, rtol=1e-4, atol=1e-4)


def test_no_negative_prompt_is_the_empty_one(sun_pipe):
    empty = sample(sun_pipe, negative="")
    assert torch.equal(sample(sun_pipe, negative=None), empty)
    assert not torch.equal(sample(sun_pipe), empty)


def test_one_negative_serves_a_list_of_prompts(sun_pipe):
    twice = sample(sun_pipe, ["a", "b"], ["dog", "dog"], seed=[0, 1])
    assert torch.equal(sample(sun_pipe, ["a", "b"], "dog", seed=[0, 1]), twice)
    texts = encode(sun_pipe, ["a", "b"])
    assert torch.equal(sample(sun_pipe, None, "dog", seed=[0, 1], prompt_embeds=texts), twice)


def test_embeddings_instead_of_prompts(sun_pipe):
    texts, negatives = encode(sun_pipe, ["a", "b"]), encode(sun_pipe, ["dog", "blue"])
    out = sample(sun_pipe, None, None, seed=[0, 1], prompt_embeds=texts, negative_prompt_embeds=negatives)
    torch.testing.assert_close(out, sample(sun_pipe, ["a", "b"], ["dog", "blue"], seed=[0, 1]), rtol=1e-4, atol=1e-4)


def test_mistakes_in_prompts_are_reported_as_diffusers_does(sun_pipe):
    with pytest.raises(ValueError, match="batch size"):
        sample(sun_pipe, ["a", "b", "c"], ["x", "y"])
    with pytest.raises(TypeError, match="negative_prompt"):
        sample(sun_pipe, "a", ["x"])
    assert CURRENT.get() is None


def test_clip_skip_reaches_the_text_encoder(sun_pipe):
    encoder = sun_pipe.text_encoder
    if not hasattr(encoder, "text_model"):  # diffusers 0.42 looks there; transformers 5 moved its parts
        encoder.text_model = SimpleNamespace(final_layer_norm=encoder.final_layer_norm)
    assert not torch.equal(sample(sun_pipe, clip_skip=1), sample(sun_pipe))


def test_guidance_scale_is_ignored_with_one_word(sun_pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = sample(sun_pipe)
        sample(sun_pipe, guidance_scale=1.0)
    with pytest.warns(UserWarning, match="guidance_scale is ignored"):
        guided = sample(sun_pipe, guidance_scale=9.0)
    assert torch.equal(guided, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(sun_pipe, guidance_scale=9.0)


def test_pictures_come_out(sun_pipe):
    images = sun_pipe("a cat", negative_prompt="a dog", num_inference_steps=2).images
    assert images[0].size == (64, 64)


def test_strength_zero_is_the_plain_conditional_pipeline(pipe):
    pipe.scheduler = TrailingDDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    plain = sample(pipe, guidance_scale=1.0)
    sun.attach(pipe, make_adapter(pipe.unet), strength=0.0)
    assert torch.equal(sample(pipe), plain)


def test_final_step_at_sigma_zero_or_as_diffusers_configures_it(pipe):
    adapter = make_adapter(pipe.unet)
    sun.attach(pipe, adapter)
    assert pipe.scheduler.final_alpha_cumprod == 1.0
    ends_at_zero = sample(pipe)
    sun.attach(pipe, adapter, final_sigma_zero=False)
    assert pipe.scheduler.final_alpha_cumprod == pipe.scheduler.alphas_cumprod[0]
    difference = (sample(pipe) - ends_at_zero).abs().max()
    assert 0 < difference < 0.03 * ends_at_zero.abs().max()


def test_the_noise_schedule_of_the_model_is_kept(pipe):
    alphas = pipe.scheduler.alphas_cumprod
    sun.attach(pipe, make_adapter(pipe.unet))
    assert torch.equal(pipe.scheduler.alphas_cumprod, alphas)


def test_another_scheduler_may_be_chosen_after(sun_pipe, count_calls):
    sun_pipe.scheduler = EulerDiscreteScheduler.from_config(sun_pipe.scheduler.config, final_sigmas_type="zero")
    calls = count_calls(sun_pipe.unet)
    out = sample(sun_pipe, num_inference_steps=4)
    assert calls.timesteps == [999, 749, 499, 249]
    sun_pipe.scheduler = DDIMScheduler.from_config(sun_pipe.scheduler.config, set_alpha_to_one=True)
    torch.testing.assert_close(
        out, sample(sun_pipe, num_inference_steps=4), rtol=0.02, atol=0.02 * float(out.abs().max())
    )  # the same ODE


def state_of(pipe: Any) -> dict[str, Any]:
    return {
        "class": type(pipe),
        "attributes": sorted(pipe.__dict__),
        "parts": {name: id(part) for name, part in pipe.components.items()},
        "config": dict(pipe.config),
        "processors": {name: id(p) for name, p in pipe.unet.attn_processors.items()},
        "unet": sorted(pipe.unet.__dict__),
        "hooks": [dict(m._forward_pre_hooks) for m in pipe.unet.modules()],
    }


@pytest.mark.parametrize("kind", ["text", "controlnet-inpaint"])
def test_detach_restores_the_pipeline_exactly(make_pipeline, kind):
    pipe = make_pipeline(getattr(diffusers, KINDS[kind]))
    extra = extra_inputs(kind)
    plain = sample(pipe, **extra)
    before = state_of(pipe)
    sun.attach(pipe, make_adapter(pipe.unet))
    sample(pipe, **extra)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    sun.detach(pipe)
    assert state_of(pipe) == before
    assert torch.equal(sample(pipe, **extra), plain)  # classifier-free guidance is back
    sun.detach(pipe)
    assert state_of(pipe) == before


def test_attaching_again_replaces_and_detaches_to_the_origin(pipe):
    before = state_of(pipe)
    first, second = make_adapter(pipe.unet), make_adapter(pipe.unet, seed=8)
    sun.attach(pipe, second)
    only_second = sample(pipe)
    sun.attach(pipe, first)
    sun.attach(pipe, second, strength=0.5)
    assert not torch.equal(sample(pipe), only_second)
    sun.attach(pipe, second)
    assert torch.equal(sample(pipe), only_second)
    sun.detach(pipe)
    assert {**state_of(pipe), "attributes": 0} == {**before, "attributes": 0}
    assert "_sun" not in pipe.__dict__


def test_a_refused_adapter_changes_nothing(sun_pipe, tmp_path):
    before, expected = state_of(sun_pipe), sample(sun_pipe)
    for broken in (from_unet(make_short_unet(text_width=12)), tmp_path / "none.safetensors"):
        with pytest.raises(SunFileError):
            sun.attach(sun_pipe, broken)
    assert {**state_of(sun_pipe), "attributes": 0} == {**before, "attributes": 0}
    assert torch.equal(sample(sun_pipe), expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_broken_run_leaves_nothing_behind(sun_pipe, error):
    expected, runs = sample(sun_pipe), []

    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        runs.append(CURRENT.get())
        assert runs[-1].kept == 1
        assert pipe.cross_attention_kwargs["sun_negative"] is runs[-1].negatives[0].text
        if step == 1:
            raise error
        return values

    with pytest.raises(error):
        sample(sun_pipe, negative="something else", callback_on_step_end=stop)
    assert CURRENT.get() is None
    assert {id(run) for run in runs} == {id(runs[0])}
    assert (runs[0].kept, runs[0].negatives) == (0, ())
    assert sun_pipe.cross_attention_kwargs is None
    assert torch.equal(sample(sun_pipe), expected)
    assert CURRENT.get() is None


def test_encoding_outside_a_run_is_untouched(sun_pipe):
    positive, negative = sun_pipe.encode_prompt("a", "cpu", 1, False)
    assert negative is None
    positive, negative = sun_pipe.encode_prompt("a", "cpu", 2, True, "b")
    assert positive.shape == negative.shape == (2, 77, TEXT_WIDTH)
    expected = sample(sun_pipe)
    sun_pipe.encode_prompt("a", "cpu", 1, True, "b")
    assert sun_pipe.cross_attention_kwargs is None
    assert torch.equal(sample(sun_pipe), expected)


def test_callbacks_may_ask_for_the_negative(sun_pipe):
    seen = []

    def look(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(values["negative_prompt_embeds"])
        return {}

    sample(sun_pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["negative_prompt_embeds"])
    assert len(seen) == 2
    assert torch.equal(seen[0], encode(sun_pipe, ["a dog"]))


@pytest.mark.parametrize("first", ["lora", "sun"])
def test_loras_load_before_or_after(make_pipeline, tmp_path, first):
    donor = make_short_unet()
    torch.manual_seed(3)
    donor.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(donor))

    pipe = make_pipeline()
    adapter = make_adapter(pipe.unet)
    if first == "lora":
        pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
        sun.attach(pipe, adapter)
    else:
        sun.attach(pipe, adapter)
        pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    out = sample(pipe)

    fused = make_pipeline()
    fused.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    fused.fuse_lora()
    fused.unload_lora_weights()
    sun.attach(fused, adapter)
    torch.testing.assert_close(out, sample(fused), rtol=1e-3, atol=1e-3 * float(out.abs().max()))

    plain = make_pipeline()
    sun.attach(plain, adapter)
    without = sample(plain)
    assert (without - out).abs().max() > 1e-2 * out.abs().max()
    assert torch.equal(sample(pipe, cross_attention_kwargs={"scale": 0.0}), without)
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), without)


def test_pipelines_may_share_a_unet(pipe, count_calls):
    adapter = make_adapter(pipe.unet)
    sun.attach(pipe, adapter)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe, vae=pipe.vae)
    other.set_progress_bar_config(disable=True)
    sun.attach(other, adapter)
    expected, calls = sample(pipe), count_calls(pipe.unet)
    sample(other, num_inference_steps=4, **extra_inputs("img2img", 0.5))
    assert calls.timesteps == [499, 249]
    sun.detach(other)
    assert torch.equal(sample(pipe), expected)
    sun.detach(pipe)
    assert not hasattr(pipe.unet, "_sun")


def test_pipelines_that_share_a_unet_keep_their_adapters_and_strengths(pipe, make_pipeline):
    """Whichever was attached last, and whichever leaves first."""
    first, second = make_adapter(pipe.unet), make_adapter(pipe.unet, seed=8)
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    alone = []
    for adapter, strength in ((first, 1.0), (second, 0.5)):
        sun.attach(pipe, adapter, strength)
        alone.append(sample(pipe))
        sun.detach(pipe)
    assert not torch.equal(*alone)
    for order in ((pipe, other), (other, pipe)):
        for target in order:
            sun.attach(target, *((first, 1.0) if target is pipe else (second, 0.5)))
        assert torch.equal(sample(pipe), alone[0])
        assert torch.equal(sample(other), alone[1])
        sun.detach(order[0])
        assert torch.equal(sample(order[1]), alone[order[1] is other])
        sun.detach(order[1])
        assert not hasattr(pipe.unet, "_sun")
    sun.attach(pipe.unet, second, 0.5)  # nor does one on the bare U-Net change theirs
    sun.attach(pipe, first)
    assert torch.equal(sample(pipe), alone[0])
    sun.detach(pipe)
    sun.detach(pipe.unet)


def test_a_detached_or_replaced_unet_is_noticed(sun_pipe):
    sun.detach(sun_pipe.unet)
    with pytest.raises(RuntimeError, match=r"sun\.attach"):
        sample(sun_pipe)
    sun.attach(sun_pipe, make_adapter(sun_pipe.unet))
    sun_pipe.unet = make_short_unet(seed=4)
    with pytest.raises(RuntimeError, match="replaced"):
        sample(sun_pipe)


def test_replaced_processors_are_noticed(sun_pipe):
    sun_pipe.enable_attention_slicing()
    with pytest.raises(RuntimeError, match="attention slicing"):
        sample(sun_pipe)


def test_inpainting_models_with_nine_channels(make_pipeline, count_calls):
    pipe = make_pipeline(diffusers.StableDiffusionInpaintPipeline, unet=make_short_unet(in_channels=9))
    sun.attach(pipe, make_adapter(pipe.unet))
    calls = count_calls(pipe.unet)
    out = sample(pipe, **extra_inputs("inpaint"))
    assert calls.rows == [1] * 2
    assert out.isfinite().all()


def test_guess_mode_runs_once_a_step(make_pipeline, count_calls):
    pipe = make_pipeline(diffusers.StableDiffusionControlNetPipeline)
    sun.attach(pipe, make_adapter(pipe.unet))
    calls = count_calls(pipe.controlnet)
    sample(pipe, guess_mode=True, **extra_inputs("controlnet"))
    assert calls.rows == [1] * 2


def test_an_attached_pipeline_can_be_saved_and_loaded(sun_pipe, tmp_path):
    expected = sample(sun_pipe)
    sun_pipe.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is StableDiffusionPipeline
    assert type(loaded.scheduler) is diffusers.PNDMScheduler
    assert type(sun_pipe.scheduler) is TrailingDDIMScheduler
    sun.attach(loaded, sun_pipe._sun.steering.adapter)
    torch.testing.assert_close(sample(loaded), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pipelines(make_pipeline, dtype):
    pipe = make_pipeline().to(dtype)
    adapter = make_adapter(make_short_unet())
    sun.attach(pipe, adapter)
    out = sample(pipe)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert {p.dtype for p in adapter.parameters()} == {dtype}
