"""SUN Scheduler, SUN Guider and SUN Adapter Info; the sampler's options and the line it says; the stock samplers."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfy_helpers import relative, sample_with

from sun.schedule import denoise_timesteps, trailing_timesteps


@pytest.fixture(scope="module")
def models(short: SimpleNamespace) -> SimpleNamespace:
    return short


def sigmas_of(host: SimpleNamespace, model, steps: int = 4, denoise: float = 1.0, mode: str = "trained"):
    return host.nodes["SUN_Scheduler"].execute(model, steps, denoise, mode).result[0]


def some_latent(seed: int = 0) -> dict[str, torch.Tensor]:
    return {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))}


# ----------------------------------------------------------------------------------------------------- SUN Scheduler


@pytest.mark.parametrize("steps", [*range(1, 13), 50])
def test_scheduler_has_the_exact_sigmas(host: SimpleNamespace, emoji: SimpleNamespace, steps: int) -> None:
    table = emoji.model.get_model_object("model_sampling").sigmas
    sigmas = sigmas_of(host, emoji.model, steps)
    assert torch.equal(sigmas[:-1], table[trailing_timesteps(steps)].cpu())
    assert sigmas[-1] == 0.0


@pytest.mark.parametrize("mode", ["trained", "respaced"])
def test_scheduler_has_both_denoise_modes(host: SimpleNamespace, emoji: SimpleNamespace, mode: str) -> None:
    table = emoji.model.get_model_object("model_sampling").sigmas
    sigmas = sigmas_of(host, emoji.model, 4, 0.5, mode)
    assert torch.equal(sigmas[:-1], table[denoise_timesteps(4, 0.5, mode)].cpu())
    assert len(sigmas) == (3 if mode == "trained" else 5)


def test_no_step_left_gives_the_latent_back(
    host: SimpleNamespace, run: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    model, start = run.apply(), some_latent()
    assert len(sigmas_of(host, model, 4, 0.0, "respaced")) == 0
    assert "Set denoise to 0.01 or more" in caplog.text
    guider = host.nodes["SUN_Guider"].execute(model, run.positive, run.negative).result[0]
    result = sample_with(
        "SamplerCustomAdvanced", model, run, start, sigmas=sigmas_of(host, model, 4, 0.1), guider=guider
    )
    assert torch.equal(result, start["samples"])


# -------------------------------------------------------------------------------------- SUN Guider, the stock samplers


def test_guider_gives_the_samplers_picture(host: SimpleNamespace, run: SimpleNamespace) -> None:
    model = run.apply()
    guider = host.nodes["SUN_Guider"].execute(model, run.positive, run.negative).result[0]
    with run.count(model) as counts:
        result = sample_with("SamplerCustomAdvanced", model, run, sigmas=sigmas_of(host, model), guider=guider)
    assert (counts.unet, counts.sun) == (4, 4 * run.layers)
    assert torch.equal(result, run.sun(model))


def test_guider_refuses_a_model_without_sun(
    host: SimpleNamespace, run: SimpleNamespace, emoji: SimpleNamespace
) -> None:
    with pytest.raises(ValueError, match="Put the node Apply SUN to Model between"):
        host.nodes["SUN_Guider"].execute(emoji.model, run.positive, run.negative)


@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp_2m"])
def test_every_stock_sampler_works_from_apply_alone(host: SimpleNamespace, run: SimpleNamespace, name: str) -> None:
    model = run.apply()
    results = {}
    for node in ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced"):
        with run.count(model) as counts:
            results[node] = sample_with(node, model, run, name=name, sigmas=sigmas_of(host, model))
        assert (counts.unet, counts.sun, counts.timesteps) == (4, 4 * run.layers, [999, 749, 499, 249]), node
    assert all(torch.equal(result, results["KSampler"]) for result in results.values())
    same = torch.equal(results["KSampler"], run.sun(model))
    assert same == (name != "dpmpp_2m")


# ------------------------------------------------------------------------------------------------------ the options


def test_respaced_denoise_runs_every_step(run: SimpleNamespace) -> None:
    model = run.apply()
    with run.count(model) as counts:
        result = run.sun(model, start=some_latent(), denoise=0.5, denoise_mode="respaced")
    assert counts.timesteps == [499, 374, 249, 124]
    assert torch.equal(result, run.ksampler(model, start=some_latent(), denoise=0.5))


@pytest.mark.parametrize("steps", [3, 4])
def test_final_step_diffusers_equals_diffusers(
    host: SimpleNamespace, run: SimpleNamespace, emoji_folder: Path, adapter_file: Path, steps: int
) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    import sun

    pipe = StableDiffusionPipeline.from_pretrained(emoji_folder, torch_dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False)
    pipe.set_progress_bar_config(disable=True)
    sun.attach(pipe, sun.SunAdapter.load(adapter_file, dtype=torch.float32), final_sigma_zero=False)
    theirs = pipe(
        "large polar bear, yellow background", negative_prompt="blurry, red, a car", num_inference_steps=steps,
        latents=torch.randn(1, 4, 16, 16, generator=torch.manual_seed(7)), output_type="latent",
    ).images  # fmt: skip
    model = run.apply()
    ours = run.sun(model, steps=steps, final_step="diffusers") * 0.18215
    assert relative(ours, theirs) < 1e-4
    assert relative(run.sun(model, steps=steps) * 0.18215, theirs) > 1e-3  # the host's last step is another


def test_final_step_diffusers_keeps_what_the_mask_keeps(run: SimpleNamespace) -> None:
    start = some_latent() | {"noise_mask": torch.zeros(1, 1, 128, 128)}
    start["noise_mask"][..., :64] = 1.0
    result = run.sun(run.apply(), start=start, denoise=0.5, final_step="diffusers")
    assert relative(result[..., 9:], start["samples"][..., 9:]) < 1e-5


@pytest.mark.parametrize(("effect", "acting"), [((0.0, 0.5), 2), ((0.25, 1.0), 3), ((0.25, 0.5), 1), ((0.0, 1.0), 4)])
def test_sun_acts_between_the_percents(run: SimpleNamespace, effect: tuple[float, float], acting: int) -> None:
    limits = {"start_percent": effect[0], "end_percent": effect[1]}
    model, limited = run.apply(), run.apply(**limits)
    with run.count(model) as counts:
        result = run.sun(model, **limits)
    assert (counts.unet, counts.sun) == (4, run.layers * acting)
    assert torch.equal(result, run.sun(limited))
    assert torch.equal(result, run.ksampler(limited))
    assert torch.equal(result, run.sun(model)) == (acting == 4)


def test_percents_that_leave_nothing_are_refused(run: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="Set start_percent below end_percent"):
        run.apply(start_percent=0.5, end_percent=0.5)
    with pytest.raises(ValueError, match="Set start_percent below end_percent"):
        run.sun(run.apply(), start_percent=0.7, end_percent=0.2)


# -------------------------------------------------------------------------------------------------- what it says after


def test_the_sampler_says_what_happened(run: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        (line,) = run.output(run.apply()).ui["text"]
    assert re.fullmatch(r"4 U-Net calls, \d+\.\d s, 4 layers, negative 77 tokens", line)
    assert f"SUN: {line}" in caplog.text
    (line,) = run.output(run.apply(), steps=1, negative=run.encode("polar bear, " * 40)).ui["text"]
    assert re.fullmatch(r"1 U-Net call, \d+\.\d s, 4 layers, negative (154|231|308) tokens", line)
    (line,) = run.output(run.apply(strength=0.0)).ui["text"]
    assert re.fullmatch(r"4 U-Net calls, \d+\.\d s, 0 layers, negative 0 tokens", line)
    (line,) = run.output(run.apply(), start=some_latent(), denoise=0.1).ui["text"]
    assert line == "0 U-Net calls: denoise 0.1 leaves no step to run"


def test_the_log_says_it_after_stock_samplers(run: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        run.ksampler(run.apply(), cfg=2.0)
    lines = [record.message for record in caplog.records if record.message.startswith("SUN: 8 U-Net calls, ")]
    assert len(lines) == 1


# -------------------------------------------------------------------------------------------------- SUN Adapter Info


def test_adapter_info(host: SimpleNamespace, shipped: SimpleNamespace) -> None:
    from sun import SunAdapter

    adapter, adapter_file = shipped.adapter, shipped.adapter_file

    output = host.nodes["SUN_AdapterInfo"].execute(adapter)
    text, facts = output.result[0], json.loads(output.result[1])
    mine = SunAdapter.load(adapter_file)
    assert facts == {
        "name": "emoji-sun (shipped with SUN)", "file": adapter_file.name, "layout": "sun",
        "base_model": "Emoji Diffusion", "widths": sorted(set(mine.channels)), "text_width": mine.text_width,
        "layers": 16, "branches": mine.info.branches, "parameters": sum(p.numel() for p in mine.parameters()),
        "dtype": "float16", "guidance_scale": mine.info.guidance_scale,
        "takes_guidance_scale": mine.guided,
        "guidance_range": mine.guidance_range and list(mine.guidance_range), "stage_length": 0.25,
        "sha256": hashlib.sha256(adapter_file.read_bytes()).hexdigest(),
    }  # fmt: skip
    assert output.ui == {"text": [text]}
    for fact in (facts["sha256"], f"w = {mine.info.guidance_scale:g}", "(4 steps)", f"{facts['parameters']:,}"):
        assert fact in text


def test_adapter_info_of_the_authors_layout_says_what_is_not_recorded(
    host: SimpleNamespace, adapter_file: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from sun import SunAdapter
    from sun.surgery import bake

    bake(SunAdapter.load(adapter_file), 4.0).save(tmp_path / "ours.safetensors", layout="official")
    save_file(load_file(tmp_path / "ours.safetensors"), tmp_path / "theirs.safetensors")  # theirs has no header
    loaded = host.part("nodes.loading").load_adapter(tmp_path / "theirs.safetensors")
    text, facts = host.nodes["SUN_AdapterInfo"].execute(loaded).result
    assert (json.loads(facts)["base_model"], json.loads(facts)["guidance_scale"]) == (None, None)
    assert "Base: not recorded" in text
    assert "Trained guidance: not recorded" in text
    assert str(tmp_path) not in text + facts
