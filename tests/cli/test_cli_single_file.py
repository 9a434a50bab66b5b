"""A single-file SD 1.x checkpoint works without any model hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ldm import make_vae, save_single_file
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import Result

from sun.pipelines.loading import load_pipeline
from sun.shipped import SINGLE_FILE_CONFIG

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def both(make_pipeline: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model as a diffusers folder and as a single file."""
    pipe = make_pipeline()
    pipe.register_modules(vae=make_vae())
    folder = tmp_path_factory.mktemp("both")
    pipe.save_pretrained(folder / "model")
    save_single_file(pipe, folder / "model.safetensors")
    return folder / "model", folder / "model.safetensors"


def test_a_single_file_gives_the_pictures_of_its_diffusers_folder(
    sun: Run, both: tuple[Path, Path], full_depth_adapter: Path, tmp_path: Path
) -> None:
    folder, file = both
    common = ("generate", "a cat", "--negative", "dog", "--adapter", full_depth_adapter, "--seed", 2)
    sun(*common, "--model", folder, "--out", tmp_path / "x.png")
    sun(*common, "--model", file, "--config", folder, "--out", tmp_path / "y.png")
    a, b = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("x.png", "y.png"))
    assert a.std() > 1
    # Some processors round a product by the address of its factors, which is another in each file: one level at most.
    assert abs(a - b).max() <= 1
    assert (a == b).mean() > 0.99


def test_a_single_file_holds_the_weights_of_its_diffusers_folder_bit_by_bit(both: tuple[Path, Path]) -> None:
    folder, file = both
    one, other = load_pipeline(str(folder)), load_pipeline(str(file), config=str(folder))
    for name in ("unet", "vae", "text_encoder"):
        expected, found = (getattr(pipe, name).state_dict() for pipe in (one, other))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    assert other.scheduler.config == one.scheduler.config


def test_the_shipped_description_is_stable_diffusion_1_5s() -> None:
    """Widths and sizes as published; built on the meta device, so that no memory is needed."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    def count(model: Any) -> int:
        return sum(p.numel() for p in model.parameters())

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SINGLE_FILE_CONFIG, subfolder="unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(SINGLE_FILE_CONFIG, subfolder="vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(SINGLE_FILE_CONFIG / "text_encoder"))
    assert count(unet) == 859_520_964
    assert count(vae) == 83_653_863
    assert count(text) == 123_060_480
    tokenizer = CLIPTokenizer.from_pretrained(SINGLE_FILE_CONFIG / "tokenizer")
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: {k: v for k, v in t.items() if k.startswith("first_stage")}, "no Stable Diffusion U-Net"),
        (lambda t: {k: v for k, v in t.items() if not k.startswith("first_stage")}, "no VAE"),
        (lambda t: {k: v for k, v in t.items() if not k.startswith("cond_stage")}, "no text encoder"),
        (lambda t: {**t, "conditioner.embedders.0.x": torch.zeros(1)}, "SDXL"),
        (lambda t: t, "--config"),
    ],
)
def test_a_single_file_that_does_not_fit_is_refused_in_a_sentence(
    sun: Run, both: tuple[Path, Path], tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], part: str
) -> None:
    save_file(change(load_file(both[1])), tmp_path / "x.safetensors")
    # "none": the adapter must not be what is wrong. Without --config the tiny file is not SD 1.5's size.
    result = sun("generate", "a", "--model", tmp_path / "x.safetensors", "--adapter", "none", code=2)
    assert part in result.output


def test_pickles_and_damaged_files_are_refused(sun: Run, both: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"PK")
    assert "not a .safetensors file" in sun("generate", "a", "--model", tmp_path / "x.ckpt", code=2).output
    (tmp_path / "y.safetensors").write_bytes(both[1].read_bytes()[:-100])
    assert "complete safetensors" in sun("generate", "a", "--model", tmp_path / "y.safetensors", code=2).output
