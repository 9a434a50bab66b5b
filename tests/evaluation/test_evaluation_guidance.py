"""The measure ``guidance``: what a method's one call adds to the prompt's prediction, beside what guidance adds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sun.evaluation import EvaluateConfig, Sampler, report
from sun.evaluation.guidance import summary
from sun.pipelines.attach import attach, detach
from sun.surgery import from_unet


@pytest.fixture(scope="module")
def sampler(tiny_model: Path) -> Sampler:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    adapter = from_unet(pipe.unet, alpha=0.5)
    return Sampler(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler, adapter=adapter, w=3.0)


def test_a_change_is_told_by_direction_size_and_what_it_explains() -> None:
    torch.manual_seed(0)
    wanted = torch.randn(5, 4, 30)
    across = torch.randn(5, 4, 30)
    across -= wanted * (across * wanted).sum(2, keepdim=True) / wanted.square().sum(2, keepdim=True)
    across *= wanted.norm(dim=2, keepdim=True) / across.norm(dim=2, keepdim=True)
    for made, cosine, size, explained in (
        (wanted, 1.0, 1.0, 1.0),
        (0.5 * wanted, 1.0, 0.5, 0.75),
        (-wanted, -1.0, 1.0, -3.0),
        (across, 0.0, 1.0, -1.0),
        (0.5 * wanted + 0.5 * across, 0.5**0.5, 0.5**0.5, 0.5),
    ):
        parts = {"method": made.square().sum(2), "guidance": wanted.square().sum(2), "product": (made * wanted).sum(2)}
        found = summary(parts)
        for name, value in (("cosine", cosine), ("relative_size", size), ("explained", explained)):
            assert found[name] == pytest.approx([value] * 4, abs=1e-4)


def test_a_report_on_guidance(tiny_model: Path, tmp_path: Path, sampler: Sampler) -> None:
    adapter, prompts = tmp_path / "adapter.safetensors", tmp_path / "prompts.txt"
    assert sampler.adapter is not None
    sampler.adapter.save(adapter)
    prompts.write_text("polar bear | snake\nred apple | owl\n")
    config = EvaluateConfig(
        model=str(tiny_model), adapter=str(adapter), prompts_file=str(prompts), prompts=2, guidance_scale=3.0,
        methods=("sun-4", "sun-8", "nasa-4", "ddim-4", "cond-4"), precision="fp32", measure=("guidance",),
        output=str(tmp_path / "report"), features="none",
    )  # fmt: skip
    model = next(iter(report(config)["models"].values()))
    found = model["guidance"]
    assert found["timesteps"] == [999, 749, 499, 249]
    assert list(found["methods"]) == ["sun-4", "nasa-4"]  # of one call, with a negative, each once
    assert "what guidance adds" in (tmp_path / "report" / "tables.md").read_text()

    # the first stage by hand: both texts at the same pure noise
    unet, t = sampler.unet, torch.tensor(999)
    x = sampler.noise(2, config.seed)
    positive, negative = sampler.encode_both(["polar bear", "red apple"], ["snake", "owl"])
    with torch.no_grad():
        own = unet(x, t, positive).sample
        wanted = 2.0 * (own - unet(x, t, negative).sample)
        attach(unet, sampler.adapter)
        made = unet(x, t, positive, cross_attention_kwargs={"sun_negative": negative}).sample - own
        detach(unet)
    cosine = torch.cosine_similarity(made.flatten(1), wanted.flatten(1)).mean()
    sun = found["methods"]["sun-4"]
    assert sun["cosine"][0] == pytest.approx(float(cosine), abs=1e-3)
    assert sun["relative_size"][0] == pytest.approx(float(made.norm() / wanted.norm()), rel=1e-3)
    explained = 1 - float((made - wanted).square().sum() / wanted.square().sum())
    assert sun["explained"][0] == pytest.approx(explained, rel=1e-3)
    assert next(iter(report(config)["models"].values())) == model  # from the cells
