"""Pictures through the hosts' own order of calls, in both families."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from webui_host import ADAPTER, UnetLog, hooks_on, load_model, make_unet, relative, sun_scripts

SUN = {"adapter": ADAPTER}
TRAINED = [999, 749, 499, 249]


@pytest.fixture(scope="module")
def blocks() -> tuple[int, ...]:
    return (2, 2)


def latent(seed: int = 5, rows: int = 1) -> torch.Tensor:
    return torch.randn((rows, 4, 8, 8), generator=torch.Generator().manual_seed(seed))


def by_hand(
    family: SimpleNamespace, host: SimpleNamespace, prompt: str, negative: str, seed: int, strength: float = 1.0,
    adapter: str = ADAPTER,
) -> torch.Tensor:  # fmt: skip
    """Eq. 9 in plain arithmetic with the adapter's formula hung on the U-Net by the core alone."""
    from sun import SunAdapter, layers_of_ldm
    from sun.attention import sun_attention
    from sun.schedule import alpha_sigma, ddim_step

    layers = SunAdapter.load(host.models_path / "sun" / adapter).sun_layers()
    text, other = (family.model.encode([words]) for words in (prompt, negative))
    handles, seen = [], {}
    for place, layer in zip(layers_of_ldm(family.unet), layers, strict=True):
        attn2 = family.unet.get_submodule(place.ldm)
        handles.append(attn2.to_q.register_forward_hook(lambda _m, _a, out: seen.update(q=out)))
        handles.append(
            attn2.to_out[0].register_forward_pre_hook(
                lambda _m, a, layer=layer: (
                    sun_attention(seen["q"], a[0], layer.texts([(1.0, other)], text, strength=strength), 2),
                )
            )
        )
    alphas = 1 / (family.model.sigmas**2 + 1)
    x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for t, s in zip(TRAINED, [*TRAINED[1:], -1], strict=True):
            eps = family.unet(x, torch.tensor([t]), context=text)
            x = ddim_step(x, eps, *alpha_sigma(alphas, t), *alpha_sigma(alphas, s))
    for handle in handles:
        handle.remove()
    return x


@pytest.mark.parametrize("adapter", [ADAPTER, "negative-only.safetensors"])
def test_four_trained_timesteps_one_call_each_and_the_formula(family: Any, host: Any, adapter: str) -> None:
    """A1111 evaluates the unconditional prompt at CFG 1 unless told otherwise; Forge leaves it out."""
    with UnetLog(family.unet) as log:
        result = family.run({"adapter": adapter}, prompt="a cat", negative_prompt="a dog", seed=3)
    assert result.errors == []
    assert (log.rows, log.timesteps) == ([1, 1, 1, 1], TRAINED)
    assert relative(result.images, by_hand(family, host, "a cat", "a dog", 3, adapter=adapter)) < 1e-4


def test_both_families_paint_the_same_picture(host: Any) -> None:
    unet, encode = make_unet(host), host.stub("models").any_text(16)
    pictures = []
    for family in ("a1111", "forge"):
        load_model(family, unet, encode)
        pictures.append(host.process(SUN, prompt="a cat", negative_prompt="a dog", seed=3, batch_size=2).images)
    assert relative(*pictures) < 1e-5


def test_off_is_bit_identical_to_a_host_without_the_extension(family: Any, host: Any) -> None:
    fields = {"prompt": "a cat", "negative_prompt": "a dog", "seed": 3, "steps": 3}
    family.run(SUN, **fields)
    off = family.run(None, **fields)
    callbacks = host.modules("script_callbacks").callbacks
    kept = dict(callbacks)
    callbacks.clear()
    processing = host.modules("processing")
    p = processing.StableDiffusionProcessingTxt2Img(**fields)
    without = torch.stack(processing.process_images(p).images)
    callbacks.update(kept)
    assert torch.equal(off.images, without)
    assert "SUN" not in off.infotexts[0]


def test_the_negative_prompt_acts_and_strength_scales_it(family: Any) -> None:
    def picture(negative: str, **sun: Any) -> torch.Tensor:
        return family.run({**SUN, **sun}, prompt="a cat", negative_prompt=negative, seed=3).images

    assert relative(picture("a dog"), picture("rain")) > 1e-3
    assert torch.equal(picture("a dog", strength=0.0), picture("rain", strength=0.0))


def test_the_guidance_scale_of_an_adapter_that_takes_it(family: Any) -> None:
    def run(adapter: str, **sun: Any) -> Any:
        return family.run({"adapter": adapter, **sun}, prompt="a cat", negative_prompt="a dog", seed=3)

    asked, seven = run("any-guidance.safetensors", guidance=7.0), run("guidance-7.safetensors")
    assert relative(asked.images, seven.images) < 1e-4
    assert "SUN guidance: 7" in asked.infotexts[0]
    own = run("any-guidance.safetensors")
    assert relative(own.images, seven.images) > 1e-3
    assert "SUN guidance" not in own.infotexts[0]
    assert torch.equal(run("any-guidance.safetensors", guidance=4).images, own.images)
    with pytest.raises(ValueError, match="fixed at 7"):
        run("guidance-7.safetensors", guidance=3.0)


@pytest.fixture
def projected(host: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often each layer of an adapter made K and V."""
    made: list[int] = []
    layer_class = host.stub("sd_webui_sun.sun.adapter").SunLayer
    original = layer_class.texts
    monkeypatch.setattr(
        layer_class, "texts", lambda self, *args, **k: made.append(id(self)) or original(self, *args, **k)
    )
    return made


def test_k_and_v_are_made_once_a_picture(family: Any, projected: list[int]) -> None:
    family.run(SUN, prompt="a cat", negative_prompt="a dog", seed=3)
    layers = len(set(projected))
    assert layers == 6
    assert len(projected) == layers
    family.run(SUN, prompt="a cat", negative_prompt="[rain:snow:2]", seed=3)
    assert len(projected) == 3 * layers  # anew for the next picture, and where prompt editing changes the text
    family.run(SUN, prompt="a cat AND a tree", negative_prompt="a dog", seed=3)
    assert len(projected) <= 5 * layers


def test_own_negative_box_replaces_the_main_one(family: Any) -> None:
    """Forge greys its box out at CFG 1 and encodes nothing; SUN's text is encoded by us."""
    own = family.run(
        {**SUN, "main_negative": False, "negative": "a dog"}, prompt="a cat", negative_prompt="rain", seed=3
    )
    main = family.run(SUN, prompt="a cat", negative_prompt="a dog", seed=3)
    assert torch.equal(own.images, main.images)


def test_negative_styles_are_added_to_the_own_box(family: Any) -> None:
    styled = family.run({**SUN, "main_negative": False, "negative": "a dog"}, prompt="a cat", styles=["rain"], seed=3)
    plain = family.run({**SUN, "main_negative": False, "negative": "a dog, rain"}, prompt="a cat", seed=3)
    assert torch.equal(styled.images, plain.images)


def test_prompt_editing_in_the_negative_changes_at_its_step(family: Any) -> None:
    edited = family.run(SUN, prompt="a cat", negative_prompt="[rain:snow:0]", seed=3).images
    rain = family.run(SUN, prompt="a cat", negative_prompt="rain", seed=3).images
    snow = family.run(SUN, prompt="a cat", negative_prompt="snow", seed=3).images
    assert relative(edited, rain) > 1e-3
    assert relative(edited, snow) > 1e-3


def test_images_of_a_batch_equal_single_ones(family: Any) -> None:
    batch = family.run(SUN, prompt="a cat", negative_prompt="a dog", seed=3, batch_size=3)
    for i in range(3):
        single = family.run(SUN, prompt="a cat", negative_prompt="a dog", seed=3 + i).images
        assert relative(batch.images[i], single[0]) < 1e-4


def test_several_batches_one_after_another(family: Any) -> None:
    """A1111's sampler object of img2img serves every batch: its guard must not stack."""
    with UnetLog(family.unet) as log:
        result = family.run(
            SUN, image=latent(), prompt="a cat", negative_prompt="a dog", seed=3, n_iter=3, denoising_strength=1.0
        )
    assert result.errors == []
    assert log.timesteps == TRAINED * 3


def test_and_sub_prompts_are_averaged_by_weight(family: Any) -> None:
    """Both hosts lean on an unconditional prediction here: A1111 would drop the first part, Forge multiply the sum."""
    fields = {"negative_prompt": "a dog", "seed": 3}
    both = family.run(SUN, prompt="a cat :0.5 AND a cat :1.5", **fields)
    one = family.run(SUN, prompt="a cat", **fields)
    assert relative(both.images, one.images) < 1e-4
    mixed = family.run(SUN, prompt="a cat AND a house", **fields).images
    assert relative(mixed, one.images) > 1e-3
    assert relative(family.run(SUN, prompt="a house AND a cat", **fields).images, mixed) < 1e-4


def test_and_with_a_batch_keeps_rows_apart(family: Any) -> None:
    fields = {"prompt": "a cat AND a house", "negative_prompt": "a dog"}
    batch = family.run(SUN, seed=3, batch_size=2, **fields).images
    for i in range(2):
        assert relative(batch[i], family.run(SUN, seed=3 + i, **fields).images[0]) < 1e-4


@pytest.mark.parametrize("family", ["a1111"], indirect=True)
def test_a1111_without_batched_conditions_counts_rows_in_chunks(host: Any, family: Any) -> None:
    fields = {"prompt": "a cat AND a house", "negative_prompt": "a dog", "seed": 3, "batch_size": 2}
    whole = family.run(SUN, **fields).images
    host.modules("shared").opts.data["batch_cond_uncond"] = False
    assert relative(family.run(SUN, **fields).images, whole) < 1e-4


@pytest.mark.parametrize("family", ["a1111"], indirect=True)
def test_a1111_older_than_1_10_still_paints_with_two_rows_a_step(host: Any, family: Any) -> None:
    fields = {"prompt": "a cat", "negative_prompt": "a dog", "seed": 3}
    new = family.run(SUN, **fields).images
    opts = host.modules("shared").opts
    label = opts.data_labels.pop("skip_early_cond")
    with UnetLog(family.unet) as log:
        old = family.run(SUN, **fields).images
    opts.data_labels["skip_early_cond"] = label
    assert log.rows == [2, 2, 2, 2]
    assert relative(old, new) < 1e-4


def test_a1111_inpainting_model_gets_as_many_image_rows_as_latents(host: Any) -> None:
    """The host cuts x to the conditional rows but not image_cond, which a 9-channel U-Net would fail on."""
    load_model("a1111", make_unet(host, channels=9), host.stub("models").any_text(16))
    result = host.process(SUN, prompt="a cat", negative_prompt="a dog", seed=3, batch_size=2)
    assert result.errors == []
    assert result.images.isfinite().all()


@pytest.mark.parametrize("family", ["a1111"], indirect=True)
def test_a1111_option_and_infotext_are_put_back(host: Any, family: Any) -> None:
    opts = host.modules("shared").opts
    opts.data["skip_early_cond"] = 0.25
    result = family.run(SUN, prompt="a cat", seed=3)
    assert opts.data["skip_early_cond"] == 0.25
    assert opts.skip_early_cond == 0.25
    assert "Skip Early CFG" not in result.infotexts[0]


@pytest.mark.parametrize("family", ["a1111"], indirect=True)
def test_a1111_settings_saved_or_changed_during_a_run_are_the_users(host: Any, family: Any) -> None:
    """The host's save writes opts.data; what SUN needs must never be in it."""
    opts, saved, rows = host.modules("shared").opts, [], []

    def user(_module: Any, args: tuple[Any, ...]) -> None:
        saved.append(dict(opts.data))
        rows.append(args[0].shape[0])
        opts.data["skip_early_cond"] = 0.3

    handle = family.unet.register_forward_pre_hook(user)
    family.run(SUN, prompt="a cat", seed=3)
    handle.remove()
    assert [data["skip_early_cond"] for data in saved] == [0.0, 0.3, 0.3, 0.3]
    assert rows == [1, 1, 1, 1]
    assert opts.skip_early_cond == 0.3


@pytest.mark.parametrize(
    ("layout", "calls", "expected"),
    [
        ([0], [1, 1, 1], [[0], [0], [0]]),  # a tile a call
        ([0, 1], [2, 4], [[0, 1], [0, 1, 0, 1]]),  # tiles together, each of the whole batch
        ([0, 0, 1, 1], [2, 2], [[0, 0], [1, 1]]),  # the host's own chunks
    ],
)
def test_a1111_rows_of_tiles_and_chunks(
    host: Any, layout: list[int], calls: list[int], expected: list[list[int]]
) -> None:
    batch = host.part("hosts.a1111").Batch(layout=layout)
    for rows, images in zip(calls, expected, strict=True):
        batch.begin(rows)
        assert batch.images == images


def test_a1111_rows_that_fit_no_tile(host: Any) -> None:
    make = host.part("hosts.a1111").Batch
    for batch, rows in ((make(layout=[0, 1]), 3), (make(layout=[0, 1], row=1), 3), (make(), 1)):
        with pytest.raises(RuntimeError, match="another extension changed the batch"):
            batch.begin(rows)


def test_forge_rows_of_tiles(host: Any) -> None:
    rows_of, off = host.part("hosts.forge").rows_of, host.part("run").UNCONDITIONAL
    assert rows_of({"cond_or_uncond": [0]}, 4, 1) == [0, 0, 0, 0]
    assert rows_of({"cond_or_uncond": [0]}, 4, 2) == [0, 1, 0, 1]
    assert rows_of({"cond_or_uncond": [1, 0]}, 8, 2) == [off, off, 0, 1] * 2
    assert rows_of({}, 2, 2) == [0, 1]
    assert rows_of({}, 2, 0) == []
    with pytest.raises(RuntimeError, match="another extension changed the batch"):
        rows_of({"cond_or_uncond": [0]}, 3, 2)


def test_tiled_sampling_gives_each_tile_the_negative(family: Any) -> None:
    """A U-Net called for two tiles at once, as MultiDiffusion does; here both tiles are the whole picture."""
    fields = {"prompt": "a cat", "negative_prompt": "a dog", "seed": 3, "batch_size": 2}
    plain, own, tiles = family.run(SUN, **fields), type(family.unet), []

    class Tiled(own):
        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            def twice(value: Any) -> Any:
                return torch.cat([value, value]) if isinstance(value, torch.Tensor) else value

            tiles.append(super().__call__(*map(twice, args), **{k: twice(v) for k, v in kwargs.items()}).chunk(2))
            return tiles[-1][0]

    family.unet.__class__ = Tiled
    result = family.run(SUN, **fields)
    family.unet.__class__ = own
    assert result.errors == []
    assert len(tiles) == 4
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in tiles)
    assert relative(result.images, plain.images) < 1e-4


def test_a_host_that_never_says_that_it_samples_is_told_apart(
    family: Any, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A1111 before 1.10 has no such hook, and some scripts sample by themselves."""
    for script in sun_scripts(host):
        monkeypatch.setattr(type(script), "process_before_every_sampling", lambda *_, **__: None)
    result = family.run(SUN, prompt="a cat", seed=3)
    assert "SUN took no part in this picture" in str(result.comments)
    assert "SUN adapter" not in result.infotexts[0]
    gone = family.run({"adapter": "gone.safetensors"}, prompt="a cat", seed=3)
    assert "gone.safetensors" in str(gone.comments)
    accelerated = family.run({"ltc": True, "inherit": "balanced"}, prompt="a cat", seed=3)
    assert "LTC-Accel and feature inheritance took no part in this picture" in str(accelerated.comments)
    assert not {"LTC-Accel tau", "Feature inheritance"} & set(accelerated.p.extra_generation_params)


def test_the_sampler_says_when_nothing_guides_it(family: Any) -> None:
    """The second pass of ADetailer takes over sampler, steps and CFG, and of the scripts those on its list alone."""
    bare = family.run(None, prompt="a cat", seed=3, sampler_name="SUN", steps=4, cfg_scale=1.0)
    assert "without the adapter" in str(bare.comments)
    guided = family.run(None, prompt="a cat", seed=3, sampler_name="SUN", steps=4, cfg_scale=4.0)
    assert "without the adapter" not in str(guided.comments)


@pytest.mark.parametrize("family", ["forge"], indirect=True)
def test_another_text_encoder_encodes_the_negative_anew(family: Any, host: Any) -> None:
    """Forge loads one beside the same checkpoint; its cache of prompts does not tell them apart."""
    fields = {"prompt": "", "negative_prompt": "a dog", "seed": 3}
    family.run(SUN, **fields)
    text = host.stub("models").any_text(16)
    other = load_model("forge", family.unet, lambda words: text([f"{word}!" for word in words]))
    family.run(SUN, **fields)
    assert "a dog" in other.encoded


def test_more_steps_than_the_model_has_timesteps(host: Any, family: Any) -> None:
    """At denoise 0.01 the host asks for the end of a schedule of 1,200 steps."""
    sigmas = host.part("sampler").trailing_sigmas(1200, 0.0, 0.0, family.model, "cpu")
    assert len(sigmas) == 1201
    assert (sigmas[:201] == sigmas[0]).all()
    assert sigmas[-1] == 0
    result = family.run(
        {**SUN, "denoise_mode": "respaced", "steps": 12}, image=latent(), prompt="a cat", seed=3,
        denoising_strength=0.01,
    )  # fmt: skip
    assert result.errors == []
    assert result.images.isfinite().all()


def test_hires_fix_uses_the_hires_negative_and_one_call_a_step(family: Any) -> None:
    fields = {"prompt": "a cat", "negative_prompt": "a dog", "seed": 3, "enable_hr": True, "denoising_strength": 0.5}
    with UnetLog(family.unet) as log:
        result = family.run(SUN, **fields)
    assert result.errors == []
    assert log.timesteps == [*TRAINED, 499, 249]
    assert log.rows == [1] * 6
    other = family.run(SUN, **fields, hr_negative_prompt="rain")
    assert relative(other.images, result.images) > 1e-4


@pytest.mark.parametrize(
    ("denoise", "mode", "timesteps"),
    [
        (0.5, "trained", [499, 249]),
        (0.75, "trained", [749, 499, 249]),
        (0.5, "respaced", [499, 374, 249, 124]),
        (1.0, "trained", TRAINED),
    ],
)
def test_image_to_image_timesteps(family: Any, denoise: float, mode: str, timesteps: list[int]) -> None:
    """The hosts' own count starts 4 steps at 0.5 from t=749."""
    with UnetLog(family.unet) as log:
        result = family.run(
            {**SUN, "denoise_mode": mode}, image=latent(), prompt="a cat", seed=3, denoising_strength=denoise
        )
    assert result.errors == []
    assert log.timesteps == timesteps


def test_tiny_denoise_gives_the_picture_back_and_says_so(family: Any) -> None:
    start = latent()
    with UnetLog(family.unet) as log:
        result = family.run(SUN, image=start, prompt="a cat", seed=3, denoising_strength=0.1)
    assert log.rows == []
    assert torch.equal(result.images, start)
    assert "Use 0.25 or more, or more steps" in result.comments
    every = {**SUN, "denoise_mode": "respaced"}
    result = family.run(every, image=start, prompt="a cat", seed=3, denoising_strength=0.0)
    assert torch.equal(result.images, start)
    assert "Use more than 0." in result.comments


def test_inpainting_keeps_the_kept_part(family: Any) -> None:
    start, mask = latent(), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    result = family.run(SUN, image=start, mask=mask, prompt="a cat", seed=3, denoising_strength=1.0)
    assert torch.allclose(result.images[..., :4], start[..., :4], atol=1e-5)
    assert not torch.allclose(result.images[..., 4:], start[..., 4:], atol=1e-2)


def test_other_samplers_run_on_the_schedule(family: Any) -> None:
    with UnetLog(family.unet) as log:
        result = family.run({**SUN, "sampling": "schedule"}, sampler_name="DPM++ 2M", prompt="a cat", seed=3)
    assert (result.p.sampler_name, log.timesteps) == ("DPM++ 2M", TRAINED)


def test_the_sampler_works_without_the_accordion(family: Any) -> None:
    with UnetLog(family.unet) as log:
        result = family.run(None, sampler_name="SUN", steps=6, cfg_scale=1.0, prompt="a cat", seed=3)
    assert set(log.timesteps) == {999, 832, 666, 499, 332, 166}
    assert result.errors == []


def test_start_noise_is_that_of_diffusers(host: Any, family: Any) -> None:
    """x_T = noise: sigma 14.6 times noise is 0.23 % off sqrt(1 + sigma^2)."""
    first: list[float] = []
    noise = latent(3)
    handle = family.unet.register_forward_pre_hook(lambda _m, a: first.append(relative(a[0], noise)))
    family.run(SUN, prompt="a cat", seed=3)
    handle.remove()
    assert first[0] < 1e-5
    sigma = float(family.model.sigmas[-1])
    assert abs(math.sqrt(1 + sigma**2) / sigma - 1) > 1e-3  # the difference this guards against


def test_interrupting_leaves_nothing_hooked(host: Any, family: Any) -> None:
    state = host.modules("shared").state
    handle = family.unet.register_forward_pre_hook(lambda *_: state.interrupt())
    result = family.run(SUN, prompt="a cat", seed=3)
    handle.remove()
    assert result.errors == []
    assert hooks_on(family.unet) == 0


def test_a_failing_run_leaves_nothing_hooked(host: Any, family: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = family.unet.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        family.run(SUN, prompt="a cat", seed=3)
    handle.remove()
    assert hooks_on(family.unet) == 0
    assert host.part("run").current() is None


def test_a_missing_adapter_stops_the_run_with_every_folder_named(host: Any, family: Any) -> None:
    """The hosts swallow a script's exceptions and would paint without SUN."""
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors") as error:
        family.run({"adapter": "gone.safetensors"}, prompt="a cat", seed=3)
    assert str(host.models_path) in str(error.value)


def test_an_adapter_of_another_model_stops_the_run(host: Any, family: Any) -> None:
    with pytest.raises(Exception, match="does not fit"):
        family.run({"adapter": host.part("folders").SHIPPED}, prompt="a cat", seed=3)


def test_a_model_without_this_unet_stops_the_run(host: Any, family: Any) -> None:
    other = torch.nn.Linear(2, 2)
    if family.name == "a1111":
        family.model.model.diffusion_model = other
    else:
        family.model.forge_objects_after_applying_lora.unet.model.diffusion_model = other
    with pytest.raises(Exception, match=r"Stable Diffusion 1\.x"):
        family.run(SUN, prompt="a cat", seed=3)


def test_a_unet_that_is_replaced_is_not_silently_ignored(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family.model, "apply_model", lambda x, *_args: x * 0.5)
    if family.name == "forge":
        family.model.forge_objects_after_applying_lora.unet.model.apply_model = lambda x, *_args: x * 0.5
    with pytest.raises(RuntimeError, match="without ever reaching"):
        family.run(SUN, prompt="a cat", seed=3)


def test_half_precision_runs_leave_the_adapter_as_it_was(host: Any, family: Any) -> None:
    single = family.run(SUN, prompt="a cat", negative_prompt="a dog", seed=3).images
    store = host.part("store")
    adapter = store.load(host.models_path / "sun" / ADAPTER)
    assert store.on(adapter, torch.device("cpu"), torch.bfloat16).sun_layers()[0].alpha_neg.dtype == torch.bfloat16
    assert torch.equal(family.run(SUN, prompt="a cat", negative_prompt="a dog", seed=3).images, single)


@pytest.mark.parametrize("family", ["forge"], indirect=True)
def test_forge_attention_of_others_is_kept_in_any_order(host: Any, family: Any) -> None:
    """An IP-Adapter sits in the attn2 slot of a block; SUN calls it and adds its change."""
    attention = host.stub("backend.attention").attention_function
    unet = family.model.forge_objects_after_applying_lora.unet
    fields = {"prompt": "a cat", "negative_prompt": "a dog", "seed": 3}
    plain = family.run(SUN, **fields).images

    def same(q: Any, k: Any, v: Any, extra: dict[str, Any]) -> torch.Tensor:
        return attention(q, k, v, extra["n_heads"])

    unet.set_attn2_replace(same, "input", 1)
    assert relative(family.run(SUN, **fields).images, plain) < 1e-5
    unet.set_attn2_replace(lambda q, k, v, extra: same(q, k, v, extra) + 0.5, "input", 1)
    assert relative(family.run(SUN, **fields).images, plain) > 1e-3


def test_controlnets_mark_row_is_taken_off_the_negative(host: Any) -> None:
    negative = host.part("negative")
    text = latent()[0, :2].flatten(1)[None]
    marked = torch.cat([torch.full((1, 1, text.shape[-1]), -1024.0), text], 1)
    assert torch.equal(negative.without_marks(marked), text)
    assert torch.equal(negative.without_marks(text), text)
