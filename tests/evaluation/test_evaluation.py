"""The measuring itself: counted calls, equal noise, known distances."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

import sun
from sun.evaluation import (
    CallCounter,
    EvaluateConfig,
    Sampler,
    bootstrap_interval,
    evaluate,
    frechet_distance,
    parse_method,
)
from sun.evaluation.metrics import kernel_statistics
from sun.surgery import from_unet


@pytest.fixture(scope="module")
def sampler(tiny_model: Path) -> Sampler:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    adapter = from_unet(pipe.unet, alpha=0.5)
    return Sampler(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler, adapter=adapter, w=3.0)


PROMPTS, NEGATIVES = ["polar bear", "red apple"], ["snake", ""]


@pytest.mark.parametrize(
    ("method", "calls"), [("ddim-4", 8), ("dpmpp-4", 8), ("unipc-3", 6), ("cond-5", 5), ("sun-4", 4), ("sun-8", 8)]
)
def test_calls_are_counted_per_picture(sampler: Sampler, method: str, calls: int) -> None:
    assert sampler(method, PROMPTS, NEGATIVES, sampler.noise(2, 0)).unet_calls == calls


def test_reference_is_diffusers_own_pipeline(sampler: Sampler, tiny_model: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    noise = sampler.noise(2, 7)
    expected = pipe(
        PROMPTS,
        negative_prompt=NEGATIVES,
        num_inference_steps=6,
        guidance_scale=3.0,
        latents=noise,
        output_type="latent",
    ).images
    assert torch.allclose(sampler("dpmpp-6", PROMPTS, NEGATIVES, noise).latents, expected, atol=1e-3, rtol=1e-3)


def test_sun_is_the_attached_pipeline(sampler: Sampler, tiny_model: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    sun.attach(pipe, from_unet(pipe.unet, alpha=0.5))
    noise = sampler.noise(2, 7)
    expected = pipe(
        PROMPTS, negative_prompt=NEGATIVES, num_inference_steps=4, latents=noise, output_type="latent"
    ).images
    assert torch.allclose(sampler("sun-4", PROMPTS, NEGATIVES, noise).latents, expected, atol=1e-4)


def test_sun_leaves_the_unet_as_it_was(sampler: Sampler) -> None:
    noise = sampler.noise(2, 0)
    before = sampler("cond-2", PROMPTS, NEGATIVES, noise).latents
    sampler("sun-2", PROMPTS, NEGATIVES, noise)
    assert torch.equal(sampler("cond-2", PROMPTS, NEGATIVES, noise).latents, before)


def test_noise_of_a_picture_does_not_depend_on_its_batch(sampler: Sampler) -> None:
    assert torch.equal(sampler.noise(5, 3)[2], sampler.noise(1, 5)[0])


def test_distances_of_known_sets() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(400, 4), torch.randn(400, 4) + 2.0
    assert frechet_distance(a, a) < 1e-6
    assert frechet_distance(a, b) == pytest.approx(16.0, rel=0.15)
    near, _ = kernel_statistics(a, torch.randn(400, 4))
    assert kernel_statistics(a, b)[0] > 10 * abs(near)


def test_bootstrap_interval_holds_the_mean() -> None:
    values = torch.arange(100.0)
    low, high = bootstrap_interval(values)
    assert low < 49.5 < high
    assert high - low < 15


def test_counter_leaves_no_hook(sampler: Sampler) -> None:
    hooks = len(sampler.unet._forward_pre_hooks)
    with CallCounter(sampler.unet):
        assert len(sampler.unet._forward_pre_hooks) == hooks + 1
    assert len(sampler.unet._forward_pre_hooks) == hooks


@pytest.mark.parametrize("method", ["sun", "magic-4", "sun-x"])
def test_unknown_methods_are_named(method: str) -> None:
    with pytest.raises(ValueError, match=r"choose from ddim-STEPS"):
        parse_method(method)


def test_evaluate_reports_every_method(tiny_model: Path, tmp_path: Path, sampler: Sampler) -> None:
    adapter, prompts = tmp_path / "adapter.safetensors", tmp_path / "prompts.txt"
    assert sampler.adapter is not None
    sampler.adapter.save(adapter)
    prompts.write_text("polar bear | snake\nred apple | \nowl | crab\nrocket\n")
    result = evaluate(
        EvaluateConfig(
            model=str(tiny_model), adapter=str(adapter), prompts_file=str(prompts), prompts=4, negative_pairs=2,
            methods=("ddim-2", "sun-2"), guidance_scale=3.0, precision="fp32", grid=str(tmp_path / "grid.png"),
            timing_batch=2, timing_rounds=1,
        )
    )  # fmt: skip
    assert result["reference"]["unet_calls"] == 50
    assert {m: r["unet_calls"] for m, r in result["methods"].items()} == {"ddim-2": 4, "sun-2": 2}
    assert all({"seconds", "paired_mse", "set_distance"} <= set(r) for r in result["methods"].values())
    assert result["floor"]["paired_mse"] > 0
    assert -1 <= result["negative_prompt"]["sun-2"]["cosine"] <= 1
    assert (tmp_path / "grid.png").exists()
