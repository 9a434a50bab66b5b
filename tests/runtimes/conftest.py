"""A Stable Diffusion of two stages and four cross-attention layers, as files, and its exports."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_adapter, make_short_unet

from sun.runtimes.contents import Contents
from sun.runtimes.export import ExportSettings, export


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These run last: once OpenVINO and ONNX Runtime have their threads, a process that forks (DataLoader) crashes."""
    items.sort(key=lambda item: item.path.parent == Path(__file__).parent)


@pytest.fixture(scope="session")
def files(make_pipeline: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, ``controlnet``, ``adapter.safetensors`` and ``guided.safetensors`` in a folder."""
    from diffusers import StableDiffusionControlNetPipeline

    folder = tmp_path_factory.mktemp("files")
    make_pipeline(unet=make_short_unet()).save_pretrained(folder / "model")
    make_pipeline(StableDiffusionControlNetPipeline, unet=make_short_unet()).controlnet.save_pretrained(
        folder / "controlnet"
    )
    make_adapter(make_short_unet()).save(folder / "adapter.safetensors")
    _guided().save(folder / "guided.safetensors")
    return folder


def _guided() -> Any:
    from sun.surgery import from_unet

    adapter = from_unet(make_short_unet(), positive=True, alpha=0.4, w=4.0, guided=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapter.eval()


@pytest.fixture(scope="session")
def exported(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Contents]]:
    """``exported(runtime, adapter="adapter.safetensors", **settings)`` -> the folder, made once, and what is in it."""
    made: dict[str, tuple[Path, Contents]] = {}
    parent = tmp_path_factory.mktemp("exported")

    def make(runtime: str, adapter: str = "adapter.safetensors", **settings: Any) -> tuple[Path, Contents]:
        key = repr((runtime, adapter, sorted(settings.items())))
        if key not in made:
            out = parent / f"export-{len(made)}"
            name = adapter if adapter == "none" else str(files / adapter)
            made[key] = out, export(ExportSettings(str(files / "model"), name, runtime, out, **settings))
        return made[key]

    return make


@pytest.fixture
def copy_of_export(exported: Callable[..., tuple[Path, Contents]], tmp_path: Path) -> Path:
    """An export of its own, to be damaged."""
    shutil.copytree(exported("onnx", weights="fp16")[0], tmp_path / "copy")
    return tmp_path / "copy"
