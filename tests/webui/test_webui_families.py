"""reForge and Forge Classic: Forge's way into the attention, with what each of them lacks.

reForge keeps its attention in `ldm_patched` instead of `backend` and encodes the unconditional prompt at CFG 1, too.
Forge Classic has no schedules apart from its samplers and no CFG scale of its own for the second pass of hires fix.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_webui_sampling import TRAINED, by_hand, latent
from test_webui_switching import small_weights
from webui_host import (
    ADAPTER,
    WIDTH,
    UnetLog,
    load_model,
    make_adapter,
    make_unet,
    relative,
    stand_in_host,
    sun_scripts,
)

SUN = {"adapter": ADAPTER}
LACKS = {
    "reforge": ("backend", "backend.attention"),
    "classic": ("backend", "backend.attention", "modules.sd_schedulers"),
}


@pytest.fixture(scope="module", params=["reforge", "classic"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A host of its own for each, the extension loaded into it: .name, .host, .unet, .model, .run(...)."""
    models = tmp_path_factory.mktemp(f"{request.param}-models")
    with stand_in_host(models, without=LACKS[request.param]) as host:
        unet = make_unet(host)
        make_adapter(unet, models / "sun" / ADAPTER)
        host.scripts, host.models_path = host.modules("scripts"), models
        model = load_model(request.param, unet, host.stub("models").any_text(WIDTH))
        yield SimpleNamespace(name=request.param, host=host, unet=unet, model=model, run=host.process)


def test_the_extension_loads_with_its_sampler(family: Any) -> None:
    assert family.host.modules("errors").reports == []
    assert len(sun_scripts(family.host)) == 2
    samplers = family.host.modules("sd_samplers")
    assert [sampler.name for sampler in samplers.samplers].count("SUN") == 1
    assert (family.host.part("sampler").host_schedules() is None) == (family.name == "classic")


def test_the_formula_in_four_calls(family: Any) -> None:
    with UnetLog(family.unet) as log:
        result = family.run(SUN, prompt="a cat", negative_prompt="a dog", seed=3)
    assert result.errors == []
    assert (log.rows, log.timesteps) == ([1, 1, 1, 1], TRAINED)
    assert relative(result.images, by_hand(family, family.host, "a cat", "a dog", 3)) < 1e-4


def test_the_page_s_samplers_on_the_schedule(family: Any) -> None:
    for sampler in ("Euler", "DPM++ 2M", "DDIM"):
        with UnetLog(family.unet) as log:
            result = family.run({**SUN, "sampling": "schedule"}, sampler_name=sampler, prompt="a cat", seed=3)
        assert (result.errors, log.timesteps) == ([], TRAINED)
    # Forge Classic would take the name of a schedule back as a setting of its own.
    assert ("Schedule type" in result.infotexts[0]) == (family.name == "reforge")


def test_image_to_image_and_hires_fix(family: Any) -> None:
    with UnetLog(family.unet) as log:
        result = family.run(SUN, image=latent(), prompt="a cat", seed=3, denoising_strength=0.5)
        hires = family.run(SUN, prompt="a cat", seed=3, enable_hr=True, denoising_strength=0.5)
    assert result.errors == hires.errors == []
    assert log.timesteps == [499, 249, *TRAINED, 499, 249]
    assert log.rows == [1] * 8


def test_and_with_a_batch(family: Any) -> None:
    both = family.run(SUN, prompt="a cat AND a tree :0.5", seed=3, batch_size=2)
    single = family.run(SUN, prompt="a cat AND a tree :0.5", seed=4)
    assert relative(both.images[1:], single.images) < 1e-5


def test_accelerators_and_the_bare_sampler(family: Any) -> None:
    with UnetLog(family.unet) as log:
        fast = family.run({"inherit": "balanced"}, prompt="a cat", seed=3, steps=4, sampler_name="Euler")
        bare = family.run(None, sampler_name="SUN", steps=6, cfg_scale=1.0, prompt="a cat", seed=3)
    assert fast.errors == bare.errors == []
    assert log.timesteps[4:] == [999, 832, 666, 499, 332, 166]


def test_another_unet_makes_its_share(family: Any, tmp_path: Path) -> None:
    listed = family.host.modules("sd_models").checkpoints_list
    save_file(small_weights(family.unet, (1, 1, 2, 1)), tmp_path / "small.safetensors")
    listed["small"] = SimpleNamespace(title="small", filename=str(tmp_path / "small.safetensors"))
    fields = {"prompt": "a cat", "seed": 3, "steps": 5, "sampler_name": "Euler"}
    with UnetLog(family.unet) as log:
        family.run(None, **fields)
        mixed = family.run({"switch": "small"}, **fields)
    listed.pop("small")
    assert mixed.errors == []
    assert log.timesteps[5:] == log.timesteps[2:5]


def test_off_leaves_nothing(family: Any) -> None:
    family.run(SUN, prompt="a cat", seed=3)
    before = family.run(None, prompt="a cat", seed=3, steps=3)
    assert family.model.forge_objects.unet.model_options.get("conditioning_modifiers", []) == []
    assert torch.equal(before.images, family.run(None, prompt="a cat", seed=3, steps=3).images)
