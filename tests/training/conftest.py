"""A Stable Diffusion small enough to train for a few steps in a test, saved as a diffusers folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from sun.emoji.base import BaseConfig, build_text_encoder, build_tokenizer, sd15_scheduler
from sun.emoji.sources import Emoji

EMOJIS = [
    Emoji(f"1f{i:03x}", name, (name.split()[0],), "Animals & Nature", "animal")
    for i, name in enumerate(("polar bear", "red apple", "snake", "rocket", "owl", "crab"))
]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = build_tokenizer(EMOJIS, 700, folder / "vocabulary")
    text_encoder = build_text_encoder(BaseConfig(text_width=32, text_layers=1), tokenizer)
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(32, 32, 32, 32), cross_attention_dim=32, attention_head_dim=2
    )
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1), scaling_factor=0.5,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=sd15_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "model")  # fmt: skip
    return folder / "model"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of captioned pictures (plain colours), x.png beside x.txt."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (40, 56), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{colour} background")
    return folder
