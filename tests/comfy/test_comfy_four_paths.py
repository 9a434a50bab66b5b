"""One picture four ways: A1111's, Forge's and ComfyUI's way into the attention, and diffusers', from the same noise on
Emoji Diffusion's weights, in LDM layout for the web UIs. Their hosts are stand-ins (tests/stubs/webui), ComfyUI's is
real."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfy_helpers import relative

TESTS = Path(__file__).resolve().parents[1]
from ldm import _unet as ldm_name  # noqa: E402
from webui_host import UnetLog, stand_in_host  # noqa: E402

PROMPT, NEGATIVE, SEED = "large polar bear, yellow background", "blurry, red, a car", 7

TOLERANCE = 1e-4
"""Largest difference in a latent, relative to the largest value: float32 through four steps, four attention kernels and
two text encoders."""


@pytest.fixture(scope="module")
def pipe(emoji_folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    import sun
    from sun.pipelines.schedulers import make_scheduler
    from sun.shipped import EMOJI_SUN

    pipe = StableDiffusionPipeline.from_pretrained(emoji_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler("ddim", pipe.scheduler.config)
    weights = {ldm_name(key): value.clone() for key, value in pipe.unet.state_dict().items()}
    sun.attach(pipe, EMOJI_SUN)
    return SimpleNamespace(pipe=pipe, ldm=weights, config=dict(pipe.unet.config))


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(SEED))


@pytest.fixture(scope="module")
def by_diffusers(pipe: Any, noise: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return pipe.pipe(
            PROMPT, negative_prompt=NEGATIVE, num_inference_steps=4, latents=noise.clone(), output_type="latent",
            height=128, width=128,
        ).images  # fmt: skip


def encode(pipe: Any, texts: list[str]) -> torch.Tensor:
    length = pipe.tokenizer.model_max_length
    ids = pipe.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]


@pytest.mark.parametrize("family", ["a1111", "forge"])
def test_web_uis_equal_diffusers(
    family: str, pipe: Any, noise: torch.Tensor, by_diffusers: torch.Tensor, tmp_path: Path
) -> None:
    config = pipe.config
    with stand_in_host(tmp_path) as host:
        unet = host.stub("ldm_unet").UNet(
            tuple(config["block_out_channels"]), config["cross_attention_dim"], heads=config["attention_head_dim"]
        )
        unet.load_state_dict(pipe.ldm)  # strict: the names are those of checkpoints
        host.load_model(family, unet.eval(), lambda texts: encode(pipe.pipe, texts))
        shipped = host.part("folders").SHIPPED
        with UnetLog(unet) as log:
            result = host.process({"adapter": shipped}, prompt=PROMPT, negative_prompt=NEGATIVE, noise=noise)
        result_of_own_box = host.process(
            {"adapter": shipped, "main_negative": False, "negative": NEGATIVE}, prompt=PROMPT, noise=noise
        )
    assert result.errors == []
    assert (log.rows, log.timesteps) == ([1, 1, 1, 1], [999, 749, 499, 249])
    distance = relative(result.images, by_diffusers)
    print(f"{family} to diffusers: {distance:.1e}")
    assert distance < TOLERANCE
    assert torch.equal(result_of_own_box.images, result.images)


def test_comfyui_equals_diffusers(
    host: SimpleNamespace, run: SimpleNamespace, noise: torch.Tensor, by_diffusers: torch.Tensor
) -> None:
    start = run.latent()
    assert torch.equal(host.comfy.sample.prepare_noise(start["samples"], SEED), noise)
    latent = run.sun(run.apply(), run.encode(PROMPT), run.encode(NEGATIVE), start=start, seed=SEED)
    distance = relative(latent * host.comfy.latent_formats.SD15().scale_factor, by_diffusers)
    print(f"comfyui to diffusers: {distance:.1e}")
    assert distance < TOLERANCE
