"""Fixtures for the tests on a real ComfyUI: the host itself, this pack loaded into it, and models to run."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file, in every import mode of pytest
from comfy_helpers import Counts
from comfyui_host import REPOSITORY, STUBS, obtain_comfyui


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.comfy)


@pytest.fixture(scope="session")
def comfyui_folder() -> Path:
    """A ComfyUI source tree."""
    return obtain_comfyui()


@contextlib.contextmanager
def _import_path(folder: Path) -> Iterator[None]:
    """`folder` first on sys.path, as ComfyUI's `nodes` is a top-level module; the stubs last."""
    from transformers.utils.import_utils import is_torchaudio_available, is_torchvision_available

    is_torchvision_available(), is_torchaudio_available()  # asked once and remembered: before the stubs are there
    sys.path.insert(0, str(folder))
    sys.path.append(str(STUBS))
    for name in ("nodes", "utils", "app", "server", "execution"):
        sys.modules.pop(name, None)
    try:
        yield
    finally:
        sys.path.remove(str(STUBS))
        for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "torchaudio")]:
            if str(STUBS) in (getattr(sys.modules[name], "__file__", None) or ""):
                del sys.modules[name]  # no other test may take them for the real thing


@pytest.fixture(scope="session")
def host(comfyui_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """ComfyUI in this process, on the CPU, with this pack loaded by ComfyUI's own loader.

    .nodes maps node ids to classes; .pack is the pack's module, .part(name) one of its modules; .base the base folder.
    """
    base = tmp_path_factory.mktemp("comfyui-base")
    for folder in ("models/sun", "models/embeddings", "input", "output", "temp", "custom_nodes"):
        (base / folder).mkdir(parents=True)
    with _import_path(comfyui_folder):
        import comfy.options

        comfy.options.enable_args_parsing(False)
        from comfy.cli_args import args

        args.cpu = True
        args.base_directory = str(base)
        import comfy.sample
        import comfy.samplers
        import comfy.sd

        import nodes

        assert asyncio.run(nodes.load_custom_node(str(REPOSITORY))), "ComfyUI could not load the pack"
    name = nodes.NODE_CLASS_MAPPINGS["SUN_Apply"].__module__.rsplit(".nodes.", 1)[0]
    return SimpleNamespace(
        comfy=comfy,
        nodes=nodes.NODE_CLASS_MAPPINGS,
        titles=nodes.NODE_DISPLAY_NAME_MAPPINGS,
        pack=sys.modules[name],
        part=lambda part: importlib.import_module(f"{name}.{part}"),
        base=base,
    )


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


# ------------------------------------------------------------------------------------------------------------- running


@pytest.fixture
def run(host: SimpleNamespace, emoji: SimpleNamespace, adapter: SimpleNamespace) -> SimpleNamespace:
    """Short names for what the tests do with nodes."""

    def apply(model=None, strength: float = 1.0, negative=None, adapter=adapter):
        return host.nodes["SUN_Apply"].execute(model or emoji.model, adapter, strength, negative).result[0]

    def encode(text: str):
        return host.nodes["CLIPTextEncode"]().encode(emoji.clip, text)[0]

    def latent(width: int = 128, height: int = 128, batch: int = 1):
        return {"samples": torch.zeros(batch, 4, height // 8, width // 8)}

    default_positive, default_negative = encode("large polar bear, yellow background"), encode("blurry, red, a car")

    def sun(model, positive=default_positive, negative=default_negative, start=None, seed=7, steps=4, denoise=1.0):
        sampler = host.nodes["SUN_Sampler"]
        start = latent() if start is None else start
        return sampler.execute(model, positive, negative, start, seed, steps, denoise).result[0]["samples"]

    def ksampler(
        model, positive=default_positive, negative=default_negative, start=None, seed=7, steps=4, cfg=1.0, name="euler",
        scheduler="simple", denoise=1.0,
    ):  # fmt: skip
        start = latent() if start is None else start
        node = host.nodes["KSampler"]()
        return node.sample(model, seed, steps, cfg, name, scheduler, positive, negative, start, denoise)[0]["samples"]

    return SimpleNamespace(
        apply=apply, encode=encode, latent=latent, sun=sun, ksampler=ksampler, positive=default_positive,
        negative=default_negative, count=lambda model: Counts(model, adapter),
    )  # fmt: skip
