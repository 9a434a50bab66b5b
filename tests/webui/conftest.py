"""Fixtures for the extension in a stand-in host: a tiny random model and an adapter file for it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from webui_host import ADAPTER, REPOSITORY, WIDTH, hooks_on, load_model, make_adapter, make_unet, stand_in_host


@pytest.fixture(scope="module")
def blocks() -> tuple[int, ...]:
    """Residual blocks of the tiny model's stages: two stages with one, where Stable Diffusion has four with two.

    Modules that ask for more of its layers have a fixture of this name with other numbers.
    """
    return (1, 1)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, blocks: tuple[int, ...]) -> Iterator[SimpleNamespace]:
    """The stand-in host with this extension, and the tiny adapter in models/sun."""
    models = tmp_path_factory.mktemp("webui-models")
    with stand_in_host(models) as host:
        host.blocks = blocks
        unet = make_unet(host)
        make_adapter(unet, models / "sun" / ADAPTER)
        make_adapter(unet, models / "sun" / "negative-only.safetensors", positive=False)
        from sun.surgery import bake

        guided = make_adapter(unet, models / "sun" / "any-guidance.safetensors", guided=True)
        bake(guided, 7.0).save(models / "sun" / "guidance-7.safetensors")
        host.scripts = host.modules("scripts")
        host.repository, host.models_path = REPOSITORY, models
        host.scripts.load_scripts(str(REPOSITORY))  # again, as "Reload UI" does: the list now has the file
        yield host


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
