"""LTC-Accel, feature inheritance and DeepCache as methods of ``sun evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sun.common.settings import ConfigError
from sun.evaluation import Sampler, parse_method
from sun.evaluation.accelerators import plan_of
from sun.evaluation.measured import asset_fingerprint
from sun.evaluation.plots import best_front
from sun.surgery import from_unet

PROMPTS, NEGATIVES = ["polar bear", "red apple"], ["snake", ""]


@pytest.fixture(scope="module")
def sampler(tiny_model: Path) -> Sampler:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    adapter = from_unet(pipe.unet, alpha=0.5)
    return Sampler(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler, w=3.0, adapter=adapter)


def draw(sampler: Sampler, method: str) -> Any:
    return sampler(method, PROMPTS, NEGATIVES, sampler.noise(2, 0))


@pytest.mark.parametrize(
    ("method", "calls", "like"),
    [
        ("ltc-10", 14, "dpmpp-10"),
        ("ltc[terms=2,scheduler=ddim]-14", 20, "ddim-14"),
        ("ltc[fast,guard=0]-9", 12, "dpmpp-9"),
        ("sun+ltc[balanced,guard=0]-8", 6, "sun-8"),
        ("inherit[fine]-6", 12, "dpmpp-6"),
        ("ltc+inherit[fast,every=3]-12", 20, "dpmpp-12"),
        ("sun+ltc[last=0]-8", 5, "sun-8"),
        ("sun+inherit[stages=1]-4", 4, "sun-4"),
    ],
)  # fmt: skip
def test_calls_and_results(sampler: Sampler, method: str, calls: float, like: str) -> None:
    plain = draw(sampler, like)
    made = draw(sampler, method)
    assert made.unet_calls == calls
    difference = (made.latents - plain.latents).abs().max()
    assert 0 < difference < plain.latents.abs().max()
    assert torch.equal(draw(sampler, method).latents, made.latents)
    assert torch.equal(draw(sampler, like).latents, plain.latents)  # nothing is left on the U-Net


def test_deepcache_is_the_outer_level(sampler: Sampler) -> None:
    pytest.importorskip("DeepCache")
    theirs = draw(sampler, "deepcache[interval=3,branch=1]-6")
    ours = draw(sampler, "inherit[outer=2,every=3]-6")
    torch.testing.assert_close(theirs.latents, ours.latents, rtol=1e-4, atol=1e-5)
    assert not [m for m in sampler.unet.modules() if "forward" in vars(m)]


def test_what_a_cell_depends_on(sampler: Sampler) -> None:
    prints = [asset_fingerprint(sampler, m) for m in ("inherit[fast]-4", "inherit[fine]-4", "sun+inherit[fast]-4")]
    assert len(set(prints)) == 3
    before = asset_fingerprint(sampler, "ltc-8")
    sampler.calibration = [("a", "b")]
    assert asset_fingerprint(sampler, "ltc-8") != before
    sampler.calibration = []
    assert plan_of(parse_method("inherit[fast,early=2,forecast=0.5]-9")).mode == "dense-early"
    assert asset_fingerprint(sampler, "ltc[fast]-8") != asset_fingerprint(sampler, "ltc[fine]-8")
    for method in ("ltc[every=1]-8", "ltc[guard=1]-8", "ltc[fine,row=5]-8", "inherit[stages=1,outer=2]-8"):
        with pytest.raises(ConfigError):
            draw(sampler, method)
    with pytest.raises(ConfigError, match="fine, balanced, fast"):
        parse_method("inherit[quick]-4")


def test_calibration_is_not_part_of_a_picture(sampler: Sampler) -> None:
    sampler.calibration = [("owl", "crab"), ("rocket", "")]
    try:
        with sampler.prepared("ltc-9") as run:
            assert any("ltc-9" in name for name in sampler.assets.loaded)
            assert run(PROMPTS, NEGATIVES, sampler.noise(2, 0)).unet_calls < 18
    finally:
        sampler.calibration = []


def test_the_best_front() -> None:
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 6.0), (4.0, 0.5), (4.0, 2.0)]
    assert best_front(points) == [(1.0, 5.0), (3.0, 1.0), (4.0, 0.5)]
