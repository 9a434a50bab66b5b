"""Experts beside a checkpoint in both families: used with it, named in the infotext, gone when the sampling ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fastapi
import pytest
import torch
from webui_host import ADAPTER, STAGES, WIDTH

from sun.compact import Experts, Shape, write_experts
from sun.compact.experts import ExpertConv, alike_of
from sun.compact.ldm import ldm_name
from sun.compact.ldm_experts import mixing_of

PICTURE = {"prompt": "a cat", "negative_prompt": "a dog", "seed": 3, "steps": 3, "sampler_name": "DPM++ 2M"}
SHAPE = Shape(STAGES, (2, 2, 2, 2), (1, 1, 1, 0), 1, WIDTH, (4, 4))
NAMES = ("down_blocks.1.resnets.0.conv2", "up_blocks.2.resnets.1.conv1")


@pytest.fixture(scope="module")
def blocks() -> tuple[int, ...]:
    return SHAPE.layers


def some_experts(unet: Any) -> Experts:
    """Random ones, as if the loaded U-Net were a compact one."""
    torch.manual_seed(1)
    made = {}
    for name in NAMES:
        kernel = unet.get_submodule(ldm_name(f"{name}.weight", SHAPE).removesuffix(".weight")).weight
        made[name] = ExpertConv(torch.randn(4, *kernel.shape) * 0.1, torch.randn(4, len(kernel)), 4 * STAGES[0], 8)
        torch.nn.init.normal_(made[name].choose.weight)
    return Experts(made, SHAPE).requires_grad_(False)


@pytest.fixture
def checkpoint(family: Any, tmp_path: Path) -> Path:
    """The file the loaded model is from, as the host remembers it."""
    path = tmp_path / "compact.safetensors"
    path.write_bytes(b"not read")
    family.model.sd_checkpoint_info = SimpleNamespace(filename=str(path))
    return path


def test_they_are_used_with_their_checkpoint(family: Any, checkpoint: Path) -> None:
    """As the U-Net with the experts on it draws; a second file takes the first one's place; without it all is plain."""
    plain = family.run(None, **PICTURE)
    assert "SUN experts" not in plain.infotexts[0]
    experts = some_experts(family.unet)
    file = write_experts(experts, checkpoint.with_suffix(".experts.safetensors"), torch.float32)
    with_them = family.run(None, **PICTURE)
    assert with_them.errors == []
    assert "SUN experts: compact.experts.safetensors" in with_them.infotexts[0]
    file.unlink()
    mixing = mixing_of(family.unet, experts)
    hook = family.unet.register_forward_pre_hook(lambda _u, args: setattr(mixing, "alike", alike_of(args[0])))
    by_hand = family.run(None, **PICTURE)
    hook.remove()
    mixing.remove()
    assert torch.allclose(with_them.images, by_hand.images, atol=1e-5)
    assert not torch.allclose(with_them.images, plain.images, atol=1e-3)
    assert torch.equal(family.run(None, **PICTURE).images, plain.images)


def test_sun_works_with_them(family: Any, checkpoint: Path) -> None:
    sun = {"enabled": True, "adapter": ADAPTER}
    plain = family.run(sun, **PICTURE).images
    write_experts(some_experts(family.unet), checkpoint.with_suffix(".experts.safetensors"), torch.float32)
    result = family.run(sun, **PICTURE)
    assert result.errors == []
    assert not torch.allclose(result.images, plain, atol=1e-3)


def test_those_of_another_model_are_refused(family: Any, checkpoint: Path) -> None:
    experts = some_experts(family.unet)
    other = Experts({NAMES[0]: dict(experts.by_name())[NAMES[1]]}, SHAPE)
    file = write_experts(other, checkpoint.with_suffix(".experts.safetensors"))
    with pytest.raises(Exception, match="for another compact U-Net"):
        family.run(None, **PICTURE)
    file.write_bytes(b"")
    with pytest.raises(fastapi.HTTPException) as refused:
        family.run(None, **PICTURE, api=True)
    assert (refused.value.status_code, "is empty" in refused.value.detail) == (409, True)
    assert not any("_conv_forward" in vars(module) for module in family.unet.modules())
