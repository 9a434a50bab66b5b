"""Fixtures for the tests on a real ComfyUI: the host itself, this pack loaded into it, and models to run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from comfy_helpers import make_controlnet, make_inpainting, models_of, short_models
from comfyui_host import REPOSITORY, obtain_comfyui, start_comfyui


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.comfy)


@pytest.fixture(scope="session")
def comfyui_folder() -> Path:
    """A ComfyUI source tree."""
    return obtain_comfyui()


@pytest.fixture(scope="session")
def host(comfyui_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """ComfyUI in this process, on the CPU, with this pack loaded by ComfyUI's own loader: see start_comfyui."""
    return start_comfyui(comfyui_folder, tmp_path_factory.mktemp("comfyui-base"))


@pytest.fixture(autouse=True)
def no_tables(request: pytest.FixtureRequest) -> Iterator[None]:
    """What LTC-Accel measured in one test stays for no other."""
    host = request.getfixturevalue("host") if "host" in request.fixturenames else None
    yield
    if host is not None:
        shutil.rmtree(host.part("nodes.ltc_patch").tables_folder(), ignore_errors=True)


# -------------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="session")
def shipped(host: SimpleNamespace) -> SimpleNamespace:
    """The shipped model: see `models_of`."""
    folders = host.part("nodes.folders")
    adapter = host.nodes["SUN_LoadAdapter"].execute(folders.SHIPPED).result[0]
    loaded = host.nodes["SUN_LoadEmojiDiffusion"].execute().result
    return models_of(host, host.part("sun.shipped").EMOJI_DIFFUSION, folders.EMOJI_SUN, adapter, loaded)


@pytest.fixture(scope="session")
def short(host: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The same with a U-Net of two stages, a layer each, and weights that are random: a call takes a fifth."""
    return short_models(host, tmp_path_factory.mktemp("short"))


@pytest.fixture(scope="module")
def models(shipped: SimpleNamespace) -> SimpleNamespace:
    """What the tests of a module draw with.

    Modules whose tests need no more of a U-Net have a fixture of this name that gives `short`.
    """
    return shipped


@pytest.fixture(scope="module")
def emoji_folder(models: SimpleNamespace) -> Path:
    return models.folder


@pytest.fixture(scope="module")
def emoji(models: SimpleNamespace) -> SimpleNamespace:
    """MODEL, CLIP and VAE. Tests clone the model, they never change it."""
    return models.emoji


@pytest.fixture(scope="module")
def adapter_file(models: SimpleNamespace) -> Path:
    return models.adapter_file


@pytest.fixture(scope="module")
def adapter(models: SimpleNamespace) -> SimpleNamespace:
    """SUN_ADAPTER."""
    return models.adapter


@pytest.fixture(scope="module")
def run(models: SimpleNamespace) -> SimpleNamespace:
    """Short names for what the tests do with nodes: see `runs`."""
    return models.run


@pytest.fixture(scope="module")
def control_file(emoji_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet for the model, with random weights."""
    return make_controlnet(emoji_folder, tmp_path_factory.mktemp("control") / "emoji-edges.safetensors")


@pytest.fixture(scope="module")
def inpainting_file(emoji_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes an inpainting model of the model, with random weights."""
    return make_inpainting(emoji_folder, tmp_path_factory.mktemp("inpaint") / "emoji-inpainting.safetensors")


@pytest.fixture(scope="session")
def compact_folder(shipped: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compact U-Net of the shipped model as it is before training."""
    from diffusers import UNet2DConditionModel

    from sun.compact import assemble, read_plan

    folder = tmp_path_factory.mktemp("compact")
    original = UNet2DConditionModel.from_pretrained(shipped.folder / "unet")
    assemble(original, read_plan(REPOSITORY / "configs" / "compact-emoji-plan.json")).save_pretrained(folder)
    return folder


@pytest.fixture
def random_extras(
    host: SimpleNamespace,
    emoji_folder: Path,
    control_file: Path,
    inpainting_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> SimpleNamespace:
    """The pack with a ControlNet and an inpainting model of random weights in the place of the trained ones."""
    module = host.part("nodes.nodes")
    monkeypatch.setattr(module, "EMOJI_DIFFUSION", emoji_folder)
    monkeypatch.setattr(module, "EMOJI_CONTROLNET", control_file)
    monkeypatch.setitem(module.VARIANTS, "inpainting", inpainting_file)
    return SimpleNamespace(control=control_file, inpainting=inpainting_file)
