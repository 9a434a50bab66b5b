"""SUN in ComfyUI's sampling: calls, schedule, numbers, and everything it must get along with."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from comfy_helpers import attention_blocks, relative


@pytest.fixture(scope="module")
def models(short: SimpleNamespace) -> SimpleNamespace:
    return short


# ------------------------------------------------------------------------------------------------ calls and timesteps


def test_one_unet_call_a_step(run: SimpleNamespace) -> None:
    model = run.apply()
    with run.count(model) as counts:
        run.sun(model)
    assert (counts.unet, counts.sun) == (4, 4 * run.layers)


@pytest.mark.parametrize("steps", [1, 3, 4, 6, 7, 8])
def test_timesteps_are_the_trained_ones(run: SimpleNamespace, steps: int) -> None:
    from sun import trailing_timesteps

    model = run.apply()
    with run.count(model) as counts:
        run.sun(model, steps=steps)
    assert counts.timesteps == trailing_timesteps(steps)


def test_ksampler_on_the_right_settings_gives_the_same_picture(run: SimpleNamespace) -> None:
    model = run.apply()
    expected = run.sun(model)
    for name in ("euler", "ddim"):
        assert torch.equal(run.ksampler(model, name=name), expected)


def test_cfg_other_than_1_works_and_warns_once(run: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    model = run.apply()
    with run.count(model) as counts, caplog.at_level(logging.WARNING):
        result = run.ksampler(model, cfg=2.0)
    assert (counts.unet, counts.sun) == (8, 4 * run.layers)  # SUN acts on the positive half alone
    assert sum("cfg is 2" in record.message for record in caplog.records) == 1
    assert result.isfinite().all()


def test_one_line_says_that_sun_is_active(run: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run.sun(run.apply())
    lines = [r.message for r in caplog.records if r.message.startswith("SUN active")]
    assert len(lines) == 1
    assert lines[0].startswith(f"SUN active: {run.layers} layers, negative 77 tokens, strength 1, adapter emoji-sun")


def test_denoise_keeps_the_trained_timesteps(run: SimpleNamespace) -> None:
    model = run.apply()
    start = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))}
    with run.count(model) as counts:
        run.sun(model, start=start, denoise=0.5)
    assert counts.timesteps == [499, 249]


@pytest.mark.parametrize(("steps", "denoise", "least"), [(4, 0.2, 0.25), (3, 0.33, 0.34), (4, 0.0, 0.25)])
def test_a_denoise_that_does_nothing_says_so(
    run: SimpleNamespace, caplog: pytest.LogCaptureFixture, steps: int, denoise: float, least: float
) -> None:
    model = run.apply()
    start = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))}
    with run.count(model) as counts:
        assert torch.equal(run.sun(model, start=start, steps=steps, denoise=denoise), start["samples"])
        assert counts.unet == 0
        assert f"denoise {denoise:g} of {steps} steps leaves no step to run" in caplog.text
        assert f"Set denoise to {least:g} or more" in caplog.text
        caplog.clear()
        run.sun(model, start=start, steps=steps, denoise=least)
    assert counts.unet == 1
    assert "leaves no step" not in caplog.text


def test_the_least_denoise_is_the_least(host: SimpleNamespace) -> None:
    from sun.schedule import denoise_timesteps

    for steps in range(1, 51):
        least = host.part("nodes.sampling").least_denoise(steps)
        assert len(denoise_timesteps(steps, least)) == 1
        assert not denoise_timesteps(steps, round(least - 0.01, 2))


def test_progress_and_preview(host: SimpleNamespace, run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy.cli_args import LatentPreviewMethod, args

    seen = []
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(
        host.comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: seen.append((value, total, preview))
    )
    run.sun(run.apply())
    assert [(value, total) for value, total, _ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(preview[0] == "JPEG" and preview[1].size == (128, 128) for _, _, preview in seen)


# --------------------------------------------------------------------------------------------------------- the numbers


def test_equals_the_diffusers_path(host: SimpleNamespace, run: SimpleNamespace, emoji_folder, adapter_file) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    import sun

    pipe = StableDiffusionPipeline.from_pretrained(emoji_folder, torch_dtype=torch.float32)
    # ComfyUI ends at sigma 0, which diffusers calls set_alpha_to_one.
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    pipe.set_progress_bar_config(disable=True)
    sun.attach(pipe, sun.SunAdapter.load(adapter_file, dtype=torch.float32))
    noise = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(7))
    theirs = pipe(
        "large polar bear, yellow background", negative_prompt="blurry, red, a car", num_inference_steps=4,
        latents=noise, output_type="latent",
    ).images  # fmt: skip
    ours = run.sun(run.apply()) * 0.18215
    difference = relative(ours, theirs)
    print(f"ComfyUI against diffusers, latents: {difference:.1e}")
    assert difference < 1e-4


def test_batch_item_equals_single(run: SimpleNamespace) -> None:
    model = run.apply()
    with run.count(model) as counts:
        batch = run.sun(model, start=run.latent(batch=3))
    assert (counts.unet, counts.sun) == (4, 4 * run.layers)
    assert relative(batch[:1], run.sun(model)) < 1e-5


def test_strength_0_is_the_plain_model_bit_for_bit(run: SimpleNamespace, emoji: SimpleNamespace) -> None:
    model = run.apply(strength=0.0)
    with run.count(model) as counts:
        result = run.sun(model)
    assert counts.sun == 0
    assert torch.equal(result, run.ksampler(emoji.model))


def test_the_model_without_sun_is_unchanged_afterwards(run: SimpleNamespace, emoji: SimpleNamespace) -> None:
    before = run.ksampler(emoji.model, cfg=3.0)
    with_sun = run.sun(run.apply())
    assert torch.equal(run.ksampler(emoji.model, cfg=3.0), before)
    assert relative(with_sun, run.ksampler(emoji.model)) > 1e-2  # and SUN does something


def test_the_negative_prompt_changes_the_picture(run: SimpleNamespace) -> None:
    model = run.apply()
    assert relative(run.sun(model, negative=run.encode("yellow")), run.sun(model)) > 1e-3


def test_seed_repeats(run: SimpleNamespace) -> None:
    model = run.apply()
    assert torch.equal(run.sun(model, seed=3), run.sun(model, seed=3))
    assert not torch.equal(run.sun(model, seed=3), run.sun(model, seed=4))


FORMATS = (torch.float16, torch.bfloat16, torch.float32)
USUAL = ((torch.float16, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16))


@pytest.mark.parametrize(
    ("model_dtype", "adapter_dtype"),
    [
        pytest.param(model, adapter, marks=[] if (model, adapter) in USUAL else [pytest.mark.slow])
        for model in FORMATS
        for adapter in FORMATS
    ],
)
def test_weights_of_any_dtype_mix(host, run, emoji_folder, adapter_file, model_dtype, adapter_dtype) -> None:
    """Half precision on either side gives the float32 picture within that precision."""
    model = host.part("nodes.emoji_model").load_unet(emoji_folder)
    model.model.diffusion_model.to(model_dtype)
    model.model.diffusion_model.dtype = model_dtype
    adapter = host.part("nodes.sun_patch").load_adapter(adapter_file)
    adapter.patcher.model.to(adapter_dtype)
    result = run.sun(run.apply(model, adapter=adapter))
    assert result.dtype == torch.float32
    assert relative(result, run.sun(run.apply())) < (0.15 if torch.bfloat16 in (model_dtype, adapter_dtype) else 0.03)


# ------------------------------------------------------------------------------------------------------- conditionings


def test_regions_and_long_prompts(host: SimpleNamespace, run: SimpleNamespace) -> None:
    model = run.apply()
    area = host.nodes["ConditioningSetArea"]().append(run.encode("red apple"), 64, 64, 0, 0, 1.0)[0]
    long = run.encode("polar bear, " * 40)
    assert long[0][0].shape[1] > 77
    positive = host.nodes["ConditioningCombine"]().combine(area, long)[0]
    with run.count(model) as counts:
        result = run.sun(model, positive, start=run.latent(width=256))
    assert (counts.unet, counts.sun) == (8, 8 * run.layers)  # two positives of different size, each with the negative
    assert result.isfinite().all()


def test_long_negative(run: SimpleNamespace) -> None:
    model = run.apply()
    with run.count(model) as counts:
        result = run.sun(model, negative=run.encode("polar bear, " * 40))
    assert (counts.unet, counts.sun) == (4, 4 * run.layers)
    assert result.isfinite().all()


def test_zeroed_negative_is_finite(host: SimpleNamespace, run: SimpleNamespace) -> None:
    zero = host.nodes["ConditioningZeroOut"]().zero_out(run.negative)[0]
    assert run.sun(run.apply(), negative=zero).isfinite().all()


def test_combined_negatives_are_averaged(host: SimpleNamespace, run: SimpleNamespace) -> None:
    model = run.apply()
    combine = host.nodes["ConditioningCombine"]().combine
    twice = combine(run.negative, run.negative)[0]
    with run.count(model) as counts:
        assert relative(run.sun(model, negative=twice), run.sun(model)) < 1e-5
    assert counts.unet == 8  # two runs of four
    other = run.sun(model, negative=combine(run.negative, run.encode("yellow"))[0])
    assert relative(other, run.sun(model)) > 1e-4


def test_negative_with_a_timestep_range(host: SimpleNamespace, run: SimpleNamespace, emoji: SimpleNamespace) -> None:
    model = run.apply()
    ranged = host.nodes["ConditioningSetTimestepRange"]().set_range
    with run.count(model) as counts:
        run.sun(model, negative=ranged(run.negative, 0.0, 0.5)[0])
    assert (counts.unet, counts.sun) == (4, 2 * run.layers)  # in force at 999 and 749
    assert torch.equal(run.sun(model, negative=ranged(run.negative, 0.999, 1.0)[0]), run.ksampler(emoji.model))


def test_negative_scheduled_by_clip_hooks(host: SimpleNamespace, run: SimpleNamespace) -> None:
    """Set CLIP Hooks encodes an entry for each part of the run, under names of its own."""
    model, ranged = run.apply(), host.nodes["ConditioningSetTimestepRange"]().set_range
    other, combine = run.encode("yellow"), host.nodes["ConditioningCombine"]().combine
    parts = [(run.negative, 0.0, 0.5), (other, 0.5, 1.0)]
    hooked = [
        [text, {**more, "clip_start_percent": start, "clip_end_percent": end}]
        for negative, start, end in parts for text, more in negative
    ]  # fmt: skip
    by_range = combine(*(ranged(*part)[0] for part in parts))[0]
    assert torch.equal(run.sun(model, negative=hooked), run.sun(model, negative=by_range))
    assert not torch.equal(run.sun(model, negative=hooked), run.sun(model, negative=combine(run.negative, other)[0]))


def test_negative_on_apply_serves_guiders_without_one(run: SimpleNamespace) -> None:
    from comfy_extras import nodes_custom_sampler as custom

    model = run.apply(negative=run.negative)
    guider, noise = custom.BasicGuider.execute(model, run.positive).result[0], custom.RandomNoise.execute(7).result[0]
    sampler = custom.KSamplerSelect.execute("euler").result[0]
    sigmas = custom.BasicScheduler.execute(model, "simple", 4, 1.0).result[0]
    result = custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, run.latent()).result[0]["samples"]
    assert torch.equal(result, run.sun(run.apply()))
    other = run.sun(model, negative=run.encode("something else"))
    assert torch.equal(result, other)  # the negative on Apply wins over the sampler's

    bare = custom.BasicGuider.execute(run.apply(), run.positive).result[0]
    with pytest.raises(ValueError, match="SUN needs a negative prompt and found none"):
        custom.SamplerCustomAdvanced.execute(noise, bare, sampler, sigmas, run.latent())


def test_negative_of_another_text_encoder_is_refused(run: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="2048 wide and this model's text is 128 wide"):
        run.sun(run.apply(), negative=[[torch.zeros(1, 77, 2048), {}]])


# --------------------------------------------------------------------------------------------------------- composition


class ImagePrompt:
    """What IP-Adapter nodes put into attn2 slots: one object a block, joined by later ones through `.add`."""

    def __init__(self, scale: float) -> None:
        self.scales = [scale]

    def add(self, scale: float) -> None:
        self.scales.append(scale)

    def __call__(self, q, k, v, extra):
        from comfy.ldm.modules.attention import optimized_attention

        out = optimized_attention(q, k, v, extra["n_heads"])
        return out + sum(scale * torch.tanh(q) for scale in self.scales)

    @classmethod
    def put_on(cls, model, scale: float):
        """As those packs do it: `.add` on whatever is in the slot already, under a key without the depth."""
        model = model.clone()
        options = model.model_options.setdefault("transformer_options", {})
        slots = options.setdefault("patches_replace", {}).setdefault("attn2", {})
        for block in attention_blocks(model):
            if block in slots:
                slots[block].add(scale)
            else:
                slots[block] = cls(scale)
        return model


def test_ip_adapter_before_and_after_are_the_same(run: SimpleNamespace, emoji: SimpleNamespace) -> None:
    before = run.sun(run.apply(ImagePrompt.put_on(emoji.model, 0.3)))
    after = run.sun(ImagePrompt.put_on(run.apply(), 0.3))
    both = run.sun(ImagePrompt.put_on(run.apply(ImagePrompt.put_on(emoji.model, 0.2)), 0.1))
    assert torch.equal(before, after)
    assert relative(both, before) < 1e-4
    assert relative(before, run.sun(run.apply())) > 1e-3  # both act
    assert relative(before, run.ksampler(ImagePrompt.put_on(emoji.model, 0.3))) > 1e-3


def test_lora_before_and_after_are_the_same(run: SimpleNamespace, emoji: SimpleNamespace) -> None:
    def lora(model):
        model = model.clone()
        torch.manual_seed(0)
        patches = {
            f"diffusion_model.{name}": (torch.randn_like(weight, dtype=torch.float32) * 0.05,)
            for name, weight in model.model.diffusion_model.named_parameters()
            if name.endswith(("attn2.to_q.weight", "attn2.to_out.0.weight"))
        }
        assert len(model.add_patches(patches, 1.0)) == 2 * run.layers
        return model

    before, after = run.sun(run.apply(lora(emoji.model))), run.sun(lora(run.apply()))
    assert torch.equal(before, after)
    assert relative(before, run.sun(run.apply())) > 1e-3


def test_lora_files_find_the_layers(host: SimpleNamespace, emoji: SimpleNamespace) -> None:
    """kohya's and diffusers' names of one layer, as LoRA files for SD 1.5 have them."""
    keys = host.comfy.lora.model_lora_keys_unet(emoji.model.model, {})
    place = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_q.weight"
    assert keys["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q"] == place
    assert keys["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_q"] == place


def test_controlnet_gets_the_positive_alone(
    host: SimpleNamespace, run: SimpleNamespace, emoji: SimpleNamespace
) -> None:
    import comfy.cldm.cldm
    import comfy.controlnet

    config = {k: v for k, v in emoji.model.model.model_config.unet_config.items() if k not in ("out_channels", "dtype")}
    config.pop("transformer_depth_output")
    net = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, operations=comfy.ops.disable_weight_init, device="cpu")
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    control = comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"))
    seen = []
    net.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    positive = host.nodes["ControlNetApply"]().apply_controlnet(run.positive, control, torch.rand(1, 128, 128, 3), 1.0)[
        0
    ]
    model = run.apply()
    with run.count(model) as counts:
        result = run.sun(model, positive)
    assert (len(seen), counts.unet, counts.sun) == (4, 4, 4 * run.layers)
    assert all(tuple(call["context"].shape) == (1, 77, 128) for call in seen)
    assert all(torch.equal(call["context"], run.positive[0][0]) for call in seen)
    assert relative(result, run.sun(model)) > 1e-4


def test_noise_mask_keeps_the_rest(run: SimpleNamespace) -> None:
    model = run.apply()
    samples = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1.0
    with run.count(model) as counts:
        result = run.sun(model, start={"samples": samples, "noise_mask": mask}, denoise=0.5)
    assert counts.unet == 2
    assert relative(result[..., 9:], samples[..., 9:]) < 1e-5
    assert relative(result[..., :8], samples[..., :8]) > 1e-2


def test_a_node_that_changes_the_batch(run: SimpleNamespace) -> None:
    """Tiling nodes call the model with more rows than they tell ComfyUI."""
    model = run.apply()

    def twice(apply_model, args):
        c = {k: v.repeat(2, 1, 1) if k == "c_crossattn" else v for k, v in args["c"].items()}
        return apply_model(args["input"].repeat(2, 1, 1, 1), args["timestep"].repeat(2), **c)[:1]

    tiled = model.clone()
    tiled.set_model_unet_function_wrapper(twice)
    assert relative(run.sun(tiled), run.sun(model)) < 1e-5


# --------------------------------------------------------------------------------------------- applying, and afterwards


def test_applying_again_replaces(host: SimpleNamespace, run: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    twice = run.apply(run.apply(strength=0.3), strength=0.8)
    assert "takes its place" in caplog.text
    with run.count(twice) as counts:
        result = run.sun(twice)
    assert (counts.unet, counts.sun) == (4, 4 * run.layers)
    assert torch.equal(result, run.sun(run.apply(strength=0.8)))


def test_one_model_with_two_strengths_side_by_side(run: SimpleNamespace) -> None:
    weak, strong = run.apply(strength=0.5), run.apply(strength=1.0)
    first = run.sun(weak)
    run.sun(strong)
    assert torch.equal(run.sun(weak), first)


def test_no_weights_in_model_options(host: SimpleNamespace, run: SimpleNamespace) -> None:
    """ComfyUI deep-copies model_options at every clone."""
    model = run.apply()
    run.sun(model)
    assert not model.model_options["transformer_options"].keys() - {"wrappers", "callbacks"}
    clone = model.clone()
    assert clone.get_additional_models_with_key("sun")[0].model is model.get_additional_models_with_key("sun")[0].model


@pytest.mark.parametrize("step", range(4))
def test_interrupting_leaves_nothing_patched(
    host: SimpleNamespace, run: SimpleNamespace, emoji: SimpleNamespace, step: int
) -> None:
    from comfy.model_management import InterruptProcessingException

    model = run.apply()
    expected, plain = run.sun(model), run.ksampler(emoji.model)
    calls = iter(range(100))

    def interrupt(*_):
        if next(calls) == step:
            raise InterruptProcessingException

    handle = model.model.diffusion_model.middle_block[1].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(InterruptProcessingException):
            run.sun(model)
    finally:
        handle.remove()
    assert model.model.current_patcher is None
    assert "sun" not in model.model_options["transformer_options"]
    assert torch.equal(run.ksampler(emoji.model), plain)
    assert torch.equal(run.sun(model), expected)


@pytest.mark.parametrize("steps_done", [1, 2, 3])
def test_the_cancel_button_leaves_nothing_patched(
    host: SimpleNamespace, run: SimpleNamespace, emoji: SimpleNamespace, monkeypatch, steps_done: int
) -> None:
    """Cancel sets ComfyUI's flag, here while the sampler reports a step; the next operation of the U-Net finds it."""
    from comfy import model_management

    model = run.apply()
    expected, plain = run.sun(model), run.ksampler(emoji.model)

    def cancel(value: int, *_, **__) -> None:
        if value == steps_done:
            model_management.interrupt_current_processing()

    with monkeypatch.context() as patched, run.count(model) as counts:
        patched.setattr(host.comfy.utils, "PROGRESS_BAR_HOOK", cancel)
        with pytest.raises(model_management.InterruptProcessingException):
            run.sun(model)
    assert counts.sun == run.layers * steps_done
    assert not model_management.processing_interrupted()
    assert model.model.current_patcher is None
    assert "sun" not in model.model_options["transformer_options"]
    assert torch.equal(run.ksampler(emoji.model), plain)
    assert torch.equal(run.sun(model), expected)


def test_sampler_refuses_a_model_without_sun(run: SimpleNamespace, emoji: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="Put the node Apply SUN to Model between"):
        run.sun(emoji.model)


def make_unet_model(host: SimpleNamespace, kind: str, **config):
    """A small random model of one of ComfyUI's kinds, as a MODEL."""
    import comfy.supported_models

    defaults = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "use_spatial_transformer": True,
        "context_dim": 128, "adm_in_channels": None, "legacy": False, "use_linear_in_transformer": False,
    }  # fmt: skip
    model_config = getattr(comfy.supported_models, kind)(defaults | config)
    model_config.set_inference_dtype(torch.float32, None)
    return host.comfy.model_patcher.ModelPatcher(model_config.get_model({}, device="cpu"), "cpu", "cpu")


def test_wrong_base_models_are_named(host: SimpleNamespace, run: SimpleNamespace) -> None:
    files = host.part("sun.files")
    sdxl = make_unet_model(
        host, "SDXL", num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 4], transformer_depth=[0, 0, 2, 2, 10, 10],
        context_dim=2048, transformer_depth_middle=10, transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
        adm_in_channels=2816, num_classes="sequential", use_linear_in_transformer=True, num_head_channels=16,
        model_channels=32,
    )  # fmt: skip
    with pytest.raises(files.SunFileError, match=r"(?s)emoji-sun.*text width 128.*SDXL model has.*2048"):
        run.apply(sdxl)
    with pytest.raises(files.SunFileError, match=r"(?s)is 32 wide, and that of this SD15 model is 64"):
        run.apply(
            make_unet_model(
                host, "SD15", num_res_blocks=[1, 1], channel_mult=[1, 2], transformer_depth=[1, 0],
                transformer_depth_output=[1, 1, 0, 0],
            )
        )  # fmt: skip
    other = host.comfy.model_patcher.ModelPatcher(torch.nn.Module(), "cpu", "cpu")
    other.model.diffusion_model, other.model.model_config = torch.nn.Linear(4, 4), SimpleNamespace(unet_config={})
    with pytest.raises(files.SunFileError, match="has no U-Net with cross-attention"):
        run.apply(other)
