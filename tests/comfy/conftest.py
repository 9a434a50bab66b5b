"""Fixtures for the tests on a real ComfyUI: the host itself, this pack loaded into it, and models to run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfy_helpers import Counts, make_controlnet, make_inpainting
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
def emoji_folder(host: SimpleNamespace) -> Path:
    """The shipped model."""
    return host.part("sun.shipped").EMOJI_DIFFUSION


@pytest.fixture(scope="session")
def emoji(host: SimpleNamespace, emoji_folder: Path) -> SimpleNamespace:
    """MODEL, CLIP and VAE from the node Load Emoji Diffusion. Tests clone the model, they never change it."""
    model, clip, vae = host.nodes["SUN_LoadEmojiDiffusion"].execute().result
    return SimpleNamespace(model=model, clip=clip, vae=vae)


@pytest.fixture(scope="session")
def adapter_file(host: SimpleNamespace) -> Path:
    """The shipped adapter."""
    return host.part("nodes.folders").EMOJI_SUN


@pytest.fixture(scope="session")
def adapter(host: SimpleNamespace) -> SimpleNamespace:
    """SUN_ADAPTER from the node Load SUN Adapter."""
    load = host.nodes["SUN_LoadAdapter"]
    return load.execute(host.part("nodes.folders").SHIPPED).result[0]


@pytest.fixture(scope="session")
def control_file(emoji_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet for the shipped model, with random weights."""
    return make_controlnet(emoji_folder, tmp_path_factory.mktemp("control") / "emoji-edges.safetensors")


@pytest.fixture(scope="session")
def inpainting_file(emoji_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes an inpainting model of the shipped model, with random weights."""
    return make_inpainting(emoji_folder, tmp_path_factory.mktemp("inpaint") / "emoji-inpainting.safetensors")


@pytest.fixture(scope="session")
def compact_folder(emoji_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compact U-Net of the shipped model as it is before training."""
    from diffusers import UNet2DConditionModel

    from sun.compact import assemble, read_plan

    folder = tmp_path_factory.mktemp("compact")
    original = UNet2DConditionModel.from_pretrained(emoji_folder / "unet")
    assemble(original, read_plan(REPOSITORY / "configs" / "compact-emoji-plan.json")).save_pretrained(folder)
    return folder


@pytest.fixture
def random_extras(
    host: SimpleNamespace, control_file: Path, inpainting_file: Path, monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    """The pack with a ControlNet and an inpainting model of random weights in the place of the trained ones."""
    module = host.part("nodes.nodes")
    monkeypatch.setattr(module, "EMOJI_CONTROLNET", control_file)
    monkeypatch.setitem(module.VARIANTS, "inpainting", inpainting_file)
    return SimpleNamespace(control=control_file, inpainting=inpainting_file)


# ------------------------------------------------------------------------------------------------------------- running


@pytest.fixture(scope="session")
def run(host: SimpleNamespace, emoji: SimpleNamespace, adapter: SimpleNamespace) -> SimpleNamespace:
    """Short names for what the tests do with nodes."""

    def apply(model=None, strength: float = 1.0, negative=None, adapter=adapter, **effect):
        return host.nodes["SUN_Apply"].execute(model or emoji.model, adapter, strength, negative, **effect).result[0]

    def encode(text: str):
        return host.nodes["CLIPTextEncode"]().encode(emoji.clip, text)[0]

    def latent(width: int = 128, height: int = 128, batch: int = 1):
        return {"samples": torch.zeros(batch, 4, height // 8, width // 8)}

    default_positive, default_negative = encode("large polar bear, yellow background"), encode("blurry, red, a car")

    def output(
        model, positive=default_positive, negative=default_negative, start=None, seed=7, steps=4, denoise=1.0, **options
    ):
        sampler = host.nodes["SUN_Sampler"]
        start = latent() if start is None else start
        return sampler.execute(model, positive, negative, start, seed, steps, denoise, **options)

    def sun(model, *args, **kwargs):
        return output(model, *args, **kwargs).result[0]["samples"]

    def ksampler(
        model, positive=default_positive, negative=default_negative, start=None, seed=7, steps=4, cfg=1.0, name="euler",
        scheduler="simple", denoise=1.0,
    ):  # fmt: skip
        start = latent() if start is None else start
        node = host.nodes["KSampler"]()
        return node.sample(model, seed, steps, cfg, name, scheduler, positive, negative, start, denoise)[0]["samples"]

    return SimpleNamespace(
        apply=apply, encode=encode, latent=latent, output=output, sun=sun, ksampler=ksampler, positive=default_positive,
        negative=default_negative, count=lambda model: Counts(model, adapter),
    )  # fmt: skip
