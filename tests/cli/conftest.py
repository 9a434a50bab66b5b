"""A tiny model and adapter as files, and a way to run the command line in this process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import make_adapter, make_short_unet, make_unet
from typer.main import get_command
from typer.testing import CliRunner, Result

from sun.cli import app


@pytest.fixture(scope="session", autouse=True)
def _commands_made_once() -> Iterator[None]:
    """typer's runner makes every command anew for each call, which takes longer than most of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.testing._get_command", functools.cache(get_command), raising=False)
        yield


@pytest.fixture(scope="session")
def model_folder(make_pipeline: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1.x of two stages as a diffusers folder; 64 x 64 pixels."""
    folder = tmp_path_factory.mktemp("model")
    make_pipeline(unet=make_short_unet()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of ``model_folder``."""
    path = tmp_path_factory.mktemp("adapter") / "tiny.safetensors"
    make_adapter(make_short_unet()).save(path)
    return path


@pytest.fixture(scope="session")
def full_depth_folder(make_pipeline: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with all of Stable Diffusion's stages and layers."""
    folder = tmp_path_factory.mktemp("full-depth-model")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def full_depth_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of ``full_depth_folder``."""
    path = tmp_path_factory.mktemp("adapter") / "full-depth.safetensors"
    make_adapter(make_unet()).save(path)
    return path


@pytest.fixture(scope="session")
def controlnet_folder(make_pipeline: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import StableDiffusionControlNetPipeline

    folder = tmp_path_factory.mktemp("controlnet")
    make_pipeline(StableDiffusionControlNetPipeline, make_short_unet()).controlnet.save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture with something in it."""
    path = tmp_path / "photo.png"
    pixels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).resize((64, 64), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def sun() -> Callable[..., Result]:
    """``sun("generate", "a cat", ..., code=0)`` runs the command line and checks its exit code."""

    def run(*arguments: object, code: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return result

    return run


@pytest.fixture
def tiny(sun: Callable[..., Result], model_folder: Path, adapter_file: Path) -> Callable[..., Result]:
    """``tiny("generate", ...)``: the same with the tiny model and adapter."""

    def run(command: str, *arguments: object, code: int = 0) -> Result:
        return sun(command, *arguments, "--model", model_folder, "--adapter", adapter_file, code=code)

    return run
