"""SUN in any diffusers pipeline of Stable Diffusion 1.x: what it can do decides, not its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from more_pipelines import FRAMES, build, controlnet, draw, motion_adapter, picture, t2i_adapter
from peft import LoraConfig
from tiny import TEXT_WIDTH, make_adapter, make_short_unet, make_unet

import sun
from sun.layers import layers_from_structure
from sun.pipelines.rows import OwnGuidance, which_rows
from sun.pipelines.schedulers import make_scheduler

# kind: rows of a U-Net call (pictures, or videos)
KINDS = {
    "StableDiffusionAdapterPipeline": 1,
    "StableDiffusionPAGPipeline": 2,
    "StableDiffusionPAGImg2ImgPipeline": 2,
    "StableDiffusionPAGInpaintPipeline": 2,
    "StableDiffusionControlNetPAGPipeline": 2,
    "StableDiffusionControlNetPAGInpaintPipeline": 2,
    "AnimateDiffPipeline": 1,
    "AnimateDiffPAGPipeline": 2,
    "AnimateDiffControlNetPipeline": 1,
    "AnimateDiffSparseControlNetPipeline": 1,
    "AnimateDiffVideoToVideoPipeline": 1,
    "AnimateDiffVideoToVideoControlNetPipeline": 1,
}


@pytest.fixture(scope="session")
def make_pipeline(make_short_pipeline: Callable[..., Any]) -> Callable[..., Any]:
    return make_short_pipeline


def with_sun(make_pipeline: Any, kind: Any) -> Any:
    pipe = build(make_pipeline, kind)
    sun.attach(pipe, make_adapter(pipe.unet))
    return pipe


@pytest.mark.parametrize("kind", KINDS)
def test_one_call_a_step_the_negative_acts_and_detach_restores(make_pipeline: Any, count_calls: Any, kind: str) -> None:
    pipe = build(make_pipeline, kind)
    plain, scheduler, processors = draw(pipe, steps=1), pipe.scheduler, pipe.unet.attn_processors
    pipe.scheduler = make_scheduler("ddim", scheduler.config)
    conditional = draw(pipe, guidance_scale=1.0)
    pipe.scheduler = scheduler

    adapter = make_adapter(pipe.unet)
    sun.attach(pipe, adapter, strength=0.0)
    assert torch.equal(draw(pipe), conditional)
    sun.attach(pipe, adapter)
    calls = count_calls(pipe.unet)
    first = draw(pipe)
    assert calls.timesteps == [999, 499]
    assert calls.rows == [KINDS[kind]] * 2
    assert (draw(pipe, negative="blue") - first).abs().max() > 0.01
    assert torch.equal(draw(pipe, guidance_scale=9.0), first)

    calls.handle.remove()
    sun.detach(pipe)
    assert pipe.scheduler is scheduler
    assert pipe.unet.attn_processors == processors
    assert torch.equal(draw(pipe, steps=1), plain)


@pytest.mark.parametrize("kind", ["StableDiffusionAdapterPipeline", "StableDiffusionPAGPipeline", "AnimateDiffPipeline",
                                  "AnimateDiffPAGPipeline"])  # fmt: skip
def test_each_image_of_a_batch_gets_its_own_negative(make_pipeline: Any, kind: str) -> None:
    """However a pipeline lays out its rows; the two prompts are the same, so the negatives alone tell the images."""
    pipe = with_sun(make_pipeline, kind)
    shape = (2, 4, FRAMES, 8, 8) if "AnimateDiff" in kind else (2, 4, 8, 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    together = draw(pipe, ["a cat", "a cat"], ["a dog", "blue"], latents=noise)
    for i, negative in enumerate(["a dog", "blue"]):
        alone = draw(pipe, "a cat", negative, latents=noise[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)


def test_rows_are_told_by_their_texts() -> None:
    a, b, x, y = torch.randn(4, 3, 2)

    def rows(*texts: torch.Tensor, frames: int = 1, prompts: tuple[torch.Tensor, ...] = (a, b)) -> Any:
        return which_rows(torch.stack(texts), torch.stack(prompts), torch.stack([x, y]), frames)

    assert rows(a, b) == [0, 1]
    assert rows(a, b, a, b) == [0, 1, 0, 1]  # perturbed attention
    assert rows(a, a, b, b) == [0, 0, 1, 1]  # a video's frames
    assert rows(a, a, b, b, a, a, b, b, frames=2) == [0, 0, 1, 1, 0, 0, 1, 1]
    assert rows(a, a, a, a, frames=2, prompts=(a, a)) == [0, 0, 1, 1]
    assert rows(a, a, a, a, prompts=(a, a)) == [0, 1, 0, 1]
    assert rows(b, a, a) == [1, 0, 0]
    assert rows(a, a + 1) is None
    with pytest.raises(OwnGuidance):
        rows(x, a)
    assert which_rows(torch.stack([a, a]), a[None], a[None]) == [0, 0]  # the same words on both sides


# ------------------------------------------------------------------------------------------------------------ videos


def test_the_released_layout_maps_by_name_on_stable_diffusions_motion_unet() -> None:
    with torch.device("meta"):
        unet = diffusers.UNetMotionModel(cross_attention_dim=768)
    layers = sun.layers_of_unet(unet)
    assert layers == layers_from_structure((320, 640, 1280, 1280))
    assert [layer.index for layer in layers] == list(range(1, 32, 2))
    assert len([name for name in unet.attn_processors if name.endswith("attn2.processor")]) > len(layers)
    with torch.device("meta"):
        released = sun.SunAdapter([layer.channels for layer in layers], 768)
    sun.attach(unet, released)
    on = [name for name, p in unet.attn_processors.items() if type(p).__name__ == "SunAttnProcessor"]
    assert on == [f"{layer.diffusers}.processor" for layer in layers]
    assert [unet.attn_processors[name].position for name in on] == list(range(16))
    sun.detach(unet)


@torch.no_grad()
def test_a_video_without_motion_is_its_frames_one_by_one() -> None:
    """The adapter's layers act in a motion U-Net as in the U-Net that it was made of."""
    unet = make_short_unet()
    motion = motion_adapter()
    for name, parameter in motion.named_parameters():
        if ".proj_out." in name:
            parameter.zero_()
    video = diffusers.UNetMotionModel.from_unet2d(unet, motion).eval()
    adapter = make_adapter(unet)
    x = torch.randn(2, 4, FRAMES, 8, 8, generator=torch.Generator().manual_seed(1))
    text, negative = torch.randn(2, 2, 5, TEXT_WIDTH, generator=torch.Generator().manual_seed(2))
    sun.attach(video, adapter)
    found = video(x, 500, text.repeat_interleave(FRAMES, 0), cross_attention_kwargs={"sun_negative": negative}).sample
    sun.detach(video)
    sun.attach(unet, adapter)
    for frame in range(FRAMES):
        alone = unet(x[:, :, frame], 500, text, cross_attention_kwargs={"sun_negative": negative}).sample
        torch.testing.assert_close(found[:, :, frame], alone, rtol=1e-4, atol=1e-4)


def test_long_videos_by_freenoise(make_pipeline: Any, count_calls: Any) -> None:
    """A prompt and a negative prompt for each frame; split inference changes nothing."""
    pipe = build(make_pipeline, "AnimateDiffPipeline")
    sun.attach(pipe, make_adapter(pipe.unet))
    pipe.enable_free_noise(context_length=4, context_stride=2)
    calls, options = count_calls(pipe.unet), {"num_frames": 6}
    prompts = {0: "a", 5: "b"}
    first = draw(pipe, prompts, {0: "x", 3: "y"}, **options)
    assert calls.rows == [1, 1]
    assert len(calls.texts[0]) == 6
    other = draw(pipe, prompts, {0: "x", 3: "z"}, **options)
    assert (other - first).abs().max() > 0.01
    assert draw(pipe, "a", "x", **options).isfinite().all()
    pipe.enable_free_noise_split_inference(temporal_split_size=4)
    torch.testing.assert_close(draw(pipe, prompts, {0: "x", 3: "y"}, **options), first, rtol=1e-3, atol=1e-3)
    sun.detach(pipe)
    sun.attach(pipe, make_adapter(make_short_unet()))
    torch.testing.assert_close(draw(pipe, prompts, {0: "x", 3: "y"}, **options), first, rtol=1e-3, atol=1e-3)


def test_motion_loras_and_decoding_in_chunks(make_pipeline: Any) -> None:
    pipe = with_sun(make_pipeline, "AnimateDiffPipeline")
    without = draw(pipe)
    torch.manual_seed(3)
    names = [name for name, _ in pipe.unet.named_modules() if "motion_modules" in name and name.endswith("to_q")]
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    assert (draw(pipe) - without).abs().max() > 1e-3
    pipe.unet.unload_lora()
    torch.testing.assert_close(draw(pipe), without)
    frames = [draw(pipe, output_type="pt", decode_chunk_size=size) for size in (1, 16)]
    assert frames[0].shape == (1, FRAMES, 3, 64, 64)
    torch.testing.assert_close(*frames, rtol=1e-4, atol=1e-4)


def test_an_ip_adapter_beside_sun_in_a_video(make_pipeline: Any) -> None:
    from ip_adapters import image_embeds, ip_adapter, load

    pipe = with_sun(make_pipeline, "AnimateDiffPipeline")
    state = ip_adapter(make_short_unet())
    load(pipe, state)
    one = draw(pipe, ip_adapter_image_embeds=[image_embeds()])
    assert (draw(pipe, ip_adapter_image_embeds=[image_embeds(seed=9)]) - one).abs().max() > 0.01
    assert (draw(pipe, negative="blue", ip_adapter_image_embeds=[image_embeds()]) - one).abs().max() > 0.01


def test_several_t2i_adapters(make_pipeline: Any) -> None:
    pipe = build(make_pipeline, "StableDiffusionAdapterPipeline")
    pipe.adapter = diffusers.MultiAdapter([t2i_adapter(), t2i_adapter(5)])
    sun.attach(pipe, make_adapter(pipe.unet))
    options = {"image": [picture(1), picture(2)], "adapter_conditioning_scale": [0.7, 0.4]}
    assert (draw(pipe, **options) - draw(pipe, negative="blue", **options)).abs().max() > 0.01


# ------------------------------------------------------------------------------------------ pipelines of other people


class OldStyle(StableDiffusionImg2ImgPipeline):
    """As community pipelines are written: guidance by the argument alone, both prompts from ``_encode_prompt``, and no
    cross_attention_kwargs. A map says from which step on each part of the picture is repainted."""

    @torch.no_grad()
    def __call__(self, prompt: Any, image: torch.Tensor, map: torch.Tensor, negative_prompt: Any = None,
                 guidance_scale: float = 7.5, num_inference_steps: int = 4) -> torch.Tensor:  # fmt: skip
        do_classifier_free_guidance = guidance_scale > 1.0
        texts = self._encode_prompt(prompt, self.device, 1, do_classifier_free_guidance, negative_prompt)
        self.scheduler.set_timesteps(num_inference_steps)
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
        x = noise
        for i, t in enumerate(self.scheduler.timesteps):
            keep = (map > i / num_inference_steps).to(x)
            x = keep * self.scheduler.add_noise(image, noise, t[None]) + (1 - keep) * x
            both = torch.cat([x] * 2) if do_classifier_free_guidance else x
            e = self.unet(both, t, encoder_hidden_states=texts).sample
            if do_classifier_free_guidance:
                u, c = e.chunk(2)
                e = u + guidance_scale * (c - u)
            x = self.scheduler.step(e, t, x).prev_sample
        return x


class OwnEncoder(OldStyle):
    """With an encoder of its own, from before diffusers had ``encode_prompt``."""

    def _encode_prompt(self, prompt: Any, device: Any, num_images_per_prompt: int, do_classifier_free_guidance: bool,
                       negative_prompt: Any = None) -> torch.Tensor:  # fmt: skip
        texts = [prompt] if isinstance(prompt, str) else prompt
        if do_classifier_free_guidance:
            texts = [negative_prompt or ""] * len(texts) + texts
        ids = self.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        return self.text_encoder(ids)[0]


class HandsOn(OldStyle):
    """A subclass that hands on whatever it is given."""

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().__call__(*args, **kwargs)

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        return super().encode_prompt(*args, **kwargs)


@pytest.mark.parametrize("kind", [OldStyle, OwnEncoder, HandsOn])
def test_community_pipelines(make_pipeline: Any, count_calls: Any, kind: Any) -> None:
    pipe = make_pipeline(kind)
    image, map_ = torch.randn(1, 4, 8, 8), torch.linspace(0, 1, 8).expand(1, 1, 8, 8)
    plain = pipe("a cat", image, map_, "a dog")
    sun.attach(pipe, make_adapter(pipe.unet))
    calls = count_calls(pipe.unet)
    first = pipe("a cat", image, map_, "a dog")
    assert calls.rows == [1] * 4
    assert (pipe("a cat", image, map_, "blue") - first).abs().max() > 0.01
    if kind is not HandsOn:
        assert torch.equal(pipe("a cat", image, map_, "a dog", 3.0), first)  # by position
    sun.detach(pipe)
    assert torch.equal(pipe("a cat", image, map_, "a dog"), plain)


class ThreeRows(StableDiffusionPipeline):
    """Guidance by three rows, whatever is asked for."""

    @torch.no_grad()
    def __call__(self, prompt: str, negative_prompt: str = "", num_inference_steps: int = 2) -> torch.Tensor:
        positive, negative = self.encode_prompt(prompt, self.device, 1, True, negative_prompt)
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        for t in self.scheduler.timesteps:
            texts = torch.cat([positive, negative, negative])
            e = self.unet(torch.cat([x] * 3), t, texts, cross_attention_kwargs=self.cross_attention_kwargs).sample
            x = self.scheduler.step(e.mean(0, keepdim=True), t, x).prev_sample
        return x


def test_guidance_of_a_pipelines_own_is_refused_at_the_first_step(make_pipeline: Any) -> None:
    pipe = make_pipeline(ThreeRows)
    sun.attach(pipe, make_adapter(pipe.unet))
    with pytest.raises(RuntimeError, match="negative prompt as rows of the batch, to run classifier-free guidance"):
        pipe("a cat", "a dog")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("StableDiffusionInstructPix2PixPipeline", "three rows a step"),
        ("StableDiffusionXLPipeline", "SDXL"),
        ("StableDiffusion3Pipeline", "its denoiser is a SD3Transformer2DModel"),
        ("StableDiffusionImageVariationPipeline", "does not encode prompts"),
        ("LatentConsistencyModelPipeline", "takes no negative prompt"),
        ("StableDiffusionControlNetXSPipeline", "its denoiser is a UNetControlNetXSModel"),
        ("DDPMPipeline", "does not encode prompts|its denoiser is"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(make_pipeline: Any, kind: str, reason: str) -> None:
    cls = getattr(diffusers, kind)
    parts: dict[str, Any] = dict(make_pipeline().components)
    asked = inspect.signature(cls.__init__).parameters
    with torch.device("meta"):
        other = {
            "transformer": lambda: diffusers.SD3Transformer2DModel(num_layers=1, num_attention_heads=1),
        }
        chosen = {name: parts.get(name) for name in asked if name in parts}
        chosen |= {name: make() for name, make in other.items() if name in asked}
    if kind == "StableDiffusionControlNetXSPipeline":
        chosen["unet"] = make_unet()  # of two layers a stage, which this class takes for granted
        chosen["controlnet"] = diffusers.ControlNetXSAdapter.from_unet(chosen["unet"], size_ratio=1.0)
    if kind == "DDPMPipeline":
        chosen["unet"] = diffusers.UNet2DModel(block_out_channels=(8, 8), norm_num_groups=4,
                                               down_block_types=("DownBlock2D",) * 2,
                                               up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    for name, parameter in asked.items():
        if name != "self" and parameter.default is inspect.Parameter.empty:
            chosen.setdefault(name, None)
    if "requires_safety_checker" in asked:
        chosen["requires_safety_checker"] = False
    pipe = cls(**chosen)
    with pytest.raises(TypeError, match=rf"SUN does not support {kind}: .*({reason}).*negative prompt"):
        sun.attach(pipe, make_adapter(make_short_unet()))


# ------------------------------------------------------------------------------------------------ what callers change


def test_callbacks_may_change_both_prompts(make_pipeline: Any) -> None:
    """AnimateDiff hands its own copy of the arguments to the U-Net."""
    for kind in ("StableDiffusionPipeline", "AnimateDiffPipeline"):
        pipe = with_sun(make_pipeline, kind)
        positive, negative = pipe.encode_prompt("a tree", pipe.device, 1, True, "blue")
        rows = FRAMES if "Animate" in kind else 1

        def change(name: str, value: torch.Tensor, pipe: Any = pipe) -> torch.Tensor:
            return draw(pipe, callback_on_step_end=lambda *_: {name: value},
                        callback_on_step_end_tensor_inputs=[name])  # fmt: skip

        first = draw(pipe)
        assert (change("prompt_embeds", positive.repeat(rows, 1, 1)) - first).abs().max() > 1e-3
        assert (change("negative_prompt_embeds", negative) - first).abs().max() > 1e-3
        with pytest.raises(ValueError, match=rf"{2 * rows} rows for {rows} of the sample.*negative_prompt_embeds"):
            change("prompt_embeds", torch.cat([negative, positive]).repeat(rows, 1, 1))  # as for guidance


def test_negatives_beside_embeddings_of_a_long_prompt(pipe: Any) -> None:
    """diffusers alone would have the text encoder read as many tokens at once."""
    sun.attach(pipe, make_adapter(pipe.unet))
    long = torch.randn(2, 154, TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    first = draw(pipe, None, "x", prompt_embeds=long)
    assert first.shape[0] == 2
    assert (draw(pipe, None, ["x", "y"], prompt_embeds=long) - first)[1].abs().max() > 1e-3
    assert draw(pipe, None, None, prompt_embeds=long, num_images_per_prompt=2).shape[0] == 4


def test_a_plain_pipeline_within_a_run_stays_plain(pipe: Any) -> None:
    """A preview from a callback, by a pipeline of the same U-Net that knows nothing of SUN."""
    parts = dict(pipe.components)
    plain = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = make_scheduler("ddim", plain.scheduler.config)
    alone = draw(plain, "a tree", guidance_scale=1.0)
    sun.attach(pipe, make_adapter(pipe.unet))
    expected, seen = draw(pipe), []

    def preview(*_: Any) -> dict[str, Any]:
        seen.append(draw(plain, "a tree", guidance_scale=1.0))
        return {}

    assert torch.equal(draw(pipe, callback_on_step_end=preview), expected)
    assert all(torch.equal(picture, alone) for picture in seen)


@pytest.mark.parametrize("kind", ["AnimateDiffPipeline", "StableDiffusionAdapterPipeline"])
def test_saved_and_loaded_and_offloaded(make_pipeline: Any, tmp_path: Any, kind: str) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    pipe = with_sun(make_pipeline, kind)
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path)
    other = type(pipe).__mro__[2].from_pretrained(tmp_path)
    other.set_progress_bar_config(disable=True)
    assert type(other).__name__ == kind
    sun.attach(other, make_adapter(other.unet))
    torch.testing.assert_close(draw(other), expected)
    for part in (other.unet, other.text_encoder, other.vae):  # as enable_model_cpu_offload puts them on
        add_hook_to_module(part, AlignDevicesHook(execution_device="cpu"), append=True)
    torch.testing.assert_close(draw(other), expected)


# -------------------------------------------------------------------------------------------------------- ControlNet


def test_a_controlnet_reads_both_prompts_as_the_authors_code_did(make_pipeline: Any, count_calls: Any) -> None:
    """The loop written out: ControlNet gets positive and negative in one text of 154 tokens, the U-Net each of them."""
    pipe = build(make_pipeline, "StableDiffusionControlNetPipeline")
    adapter = make_adapter(pipe.unet)
    sun.attach(pipe, adapter)
    alone = draw(pipe)
    sun.attach(pipe, adapter, controlnet_prompt="both")
    calls, on_unet = count_calls(pipe.controlnet), count_calls(pipe.unet)
    found = draw(pipe)
    assert (found - alone).abs().max() > 1e-3
    assert [text.shape for text in calls.texts] == [(1, 154, TEXT_WIDTH)] * 2
    assert [text.shape for text in on_unet.texts] == [(1, 77, TEXT_WIDTH)] * 2

    positive, negative = pipe.encode_prompt("a cat", "cpu", 1, True, "a dog")
    x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    image = pipe.control_image_processor.preprocess(picture(), height=64, width=64)
    both, times = torch.cat([positive, negative], dim=1), [999, 499]
    cumprod = pipe.scheduler.alphas_cumprod
    sun.detach(pipe)
    sun.attach(pipe.unet, adapter)
    for t, after in zip(times, (cumprod[499], torch.ones(())), strict=True):
        with torch.no_grad():
            down, middle = pipe.controlnet(x, t, both, image, return_dict=False)
            control = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            e = pipe.unet(x, t, positive, cross_attention_kwargs={"sun_negative": negative}, **control).sample
        a, s = cumprod[t].sqrt(), (1 - cumprod[t]).sqrt()
        x = after.sqrt() * (x - s * e) / a + (1 - after).sqrt() * e
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prompt", ["positive", "both"])
def test_several_controlnets_and_those_of_videos(make_pipeline: Any, count_calls: Any, prompt: str) -> None:
    tokens = {"positive": 77, "both": 154}[prompt]
    pipe = build(make_pipeline, "StableDiffusionControlNetPipeline")
    nets = [pipe.controlnet, controlnet(pipe.unet)]
    pipe.controlnet = diffusers.MultiControlNetModel(nets)
    sun.attach(pipe, make_adapter(pipe.unet), controlnet_prompt=prompt)
    calls = [count_calls(net) for net in nets]
    draw(pipe, image=[picture(1), picture(2)], controlnet_conditioning_scale=[0.5, 1.0])
    assert [log.texts[0].shape for log in calls] == [(1, tokens, TEXT_WIDTH)] * 2

    video = build(make_pipeline, "AnimateDiffControlNetPipeline")
    sun.attach(video, make_adapter(video.unet), controlnet_prompt=prompt)
    calls = count_calls(video.controlnet)
    draw(video)
    assert calls.texts[0].shape == (FRAMES, tokens, TEXT_WIDTH)
    assert not [m for m in (video.controlnet, pipe.controlnet) if len(m._forward_pre_hooks) > 1]


def test_a_wrong_name_for_what_a_controlnet_reads_is_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match="'positive' or 'both', not 'negative'"):
        sun.attach(pipe, make_adapter(pipe.unet), controlnet_prompt="negative")
