"""Fixtures for the extension in a stand-in host: a tiny random model and an adapter file for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from webui_host import hooks_on, load_model, stand_in_host

STAGES, WIDTH = (8, 16, 24, 24), 16
ADAPTER = "tiny.safetensors"


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The stand-in host with this extension, and the tiny adapter in models/sun."""
    models = tmp_path_factory.mktemp("webui-models")
    with stand_in_host(models) as host:
        unet = make_unet(host)
        make_adapter(unet, models / "sun" / ADAPTER)
        make_adapter(unet, models / "sun" / "negative-only.safetensors", positive=False)
        host.scripts = host.modules("scripts")
        from webui_host import REPOSITORY

        host.repository, host.models_path = REPOSITORY, models
        host.scripts.load_scripts(str(REPOSITORY))  # again, as "Reload UI" does: the list now has the file
        yield host


def make_unet(host: SimpleNamespace, channels: int = 4) -> Any:
    torch.manual_seed(0)
    return host.stub("ldm_unet").UNet(STAGES, WIDTH, heads=2, groups=4, channels=channels).eval().requires_grad_(False)


def make_adapter(unet: Any, path: Path, positive: bool = True) -> None:
    from sun import SunAdapter, layers_of_ldm

    layers = layers_of_ldm(unet)
    adapter = SunAdapter([layer.channels for layer in layers], WIDTH, positive, names=[la.name for la in layers])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapter.save(path)


@pytest.fixture(params=["a1111", "forge"])
def family(request: pytest.FixtureRequest, host: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """A family with the tiny model loaded: .name, .unet, .model, .run(...). Nothing may be left on the U-Net."""
    unet = make_unet(host)
    model = load_model(request.param, unet, host.stub("models").any_text(WIDTH))
    opts = host.modules("shared").opts
    before = dict(opts.data)
    yield SimpleNamespace(name=request.param, unet=unet, model=model, run=host.process)
    opts.data.clear()
    opts.data.update(before)
    assert hooks_on(unet) == 0
    if request.param == "forge":
        assert model.forge_objects.unet.model_options.get("conditioning_modifiers", []) == []


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value of b."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())
