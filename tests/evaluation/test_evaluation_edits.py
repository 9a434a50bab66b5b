"""img2img and inpainting in the evaluation: the hosts' own edits, counted, compared, kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from sun.common.settings import ConfigError
from sun.evaluation import EvaluateConfig, Sampler, report
from sun.evaluation.edits import centre_mask, parse_edit
from sun.evaluation.sampler import Edit
from sun.pipelines.schedulers import make_scheduler
from sun.surgery import from_unet

PROMPTS, NEGATIVES = ["polar bear", "red apple"], ["snake", ""]


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> StableDiffusionImg2ImgPipeline:
    return StableDiffusionImg2ImgPipeline.from_pretrained(tiny_model, safety_checker=None)


@pytest.fixture(scope="module")
def sampler(pipe: StableDiffusionImg2ImgPipeline) -> Sampler:
    adapter = from_unet(pipe.unet, alpha=0.5)
    return Sampler(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler, adapter=adapter, w=3.0)


def starts(sampler: Sampler) -> torch.Tensor:
    return 0.7 * sampler.noise(2, 100)


@pytest.mark.parametrize(("method", "scheduler"), [("ddim-4", "ddim"), ("dpmpp-6", "dpmpp_2m"), ("unipc-6", "unipc")])
def test_img2img_is_diffusers_own(
    sampler: Sampler, pipe: StableDiffusionImg2ImgPipeline, method: str, scheduler: str
) -> None:
    plain = pipe.scheduler
    pipe.scheduler = make_scheduler(scheduler, plain.config)
    try:
        expected = pipe(
            PROMPTS, negative_prompt=NEGATIVES, image=starts(sampler), strength=0.5, guidance_scale=3.0,
            num_inference_steps=int(method[-1]), output_type="latent",
            generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
        ).images  # fmt: skip
    finally:
        pipe.scheduler = plain
    made = sampler(method, PROMPTS, NEGATIVES, sampler.noise(2, 7), edit=Edit(starts(sampler), 0.5))
    torch.testing.assert_close(made.latents, expected, rtol=1e-3, atol=1e-3)
    assert made.unet_calls == int(method[-1])  # half of the steps, two rows each


@pytest.mark.parametrize("method", ["sun-4", "dpmpp-4"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_inpainting_keeps_what_is_not_masked(sampler: Sampler, method: str, strength: float) -> None:
    init, noise = starts(sampler), sampler.noise(2, 7)
    mask = centre_mask(*init.shape[2:])
    made = sampler(method, PROMPTS, NEGATIVES, noise, edit=Edit(init, strength, mask)).latents
    assert torch.equal(made * (1 - mask), init * (1 - mask))
    assert not torch.allclose(made * mask, init * mask, atol=0.1)
    whole = sampler(method, PROMPTS, NEGATIVES, noise, edit=Edit(init, strength, torch.ones_like(mask))).latents
    assert torch.equal(whole, sampler(method, PROMPTS, NEGATIVES, noise, edit=Edit(init, strength)).latents)


def test_full_strength_begins_at_noise(sampler: Sampler) -> None:
    noise = sampler.noise(2, 7)
    plain = sampler("sun-4", PROMPTS, NEGATIVES, noise).latents
    assert torch.equal(sampler("sun-4", PROMPTS, NEGATIVES, noise, edit=Edit(starts(sampler))).latents, plain)


@pytest.mark.parametrize("name", ["img2img", "img2img-0", "img2img-1.5", "outpaint-0.5", "inpaint-x"])
def test_unknown_edits_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=r"as img2img-0\.5, not"):
        parse_edit(name)


def test_a_report_on_edits(tiny_model: Path, tmp_path: Path, sampler: Sampler, short_reference: str) -> None:
    adapter, prompts = tmp_path / "adapter.safetensors", tmp_path / "prompts.txt"
    assert sampler.adapter is not None
    sampler.adapter.save(adapter)
    prompts.write_text("polar bear | snake\nred apple | \nowl | crab\n")
    config = EvaluateConfig(
        model=str(tiny_model), adapter=str(adapter), prompts_file=str(prompts), prompts=3, methods=("sun-2", "ddim-2"),
        guidance_scale=3.0, precision="fp32", measure=("edits",), edits=("img2img-0.5", "inpaint-1"), edit_prompts=2,
        output=str(tmp_path / "report"), features="none",
    )  # fmt: skip
    model = next(iter(report(config)["models"].values()))
    assert set(model["edits"]) == {"img2img-0.5", "inpaint-1"}
    rows = model["edits"]["img2img-0.5"]
    assert {name: row["unet_calls"] for name, row in rows.items()} == {
        "dpmpp-5": 6, "sun-2": 1, "ddim-2": 2, "floor": 6,
    }  # fmt: skip
    assert all(row["paired_mse"] > 0 for name, row in rows.items() if name != short_reference)
    folder = next((tmp_path / "report").glob("*/inpaint-1.png")).parent
    assert (folder / "img2img-0.5.png").exists()
    tables = (tmp_path / "report" / "tables.md").read_text()
    assert "Editing, inpaint-1" in tables
    assert report(config)["models"] == {next(iter(report(config)["models"])): model}
