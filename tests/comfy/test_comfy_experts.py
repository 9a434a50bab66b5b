"""Experts of a compact U-Net in ComfyUI: the numbers of diffusers, LoRA beside them, nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfy_helpers import make_small, relative
from diffusers import UNet2DConditionModel

from sun.compact import Plan, attach_experts, experts_for, read_experts, shape_of, write_experts

REMOVED = ("pair.0.1", "pair.1.1", "pair.3.1")


@pytest.fixture(scope="module")
def small(emoji: SimpleNamespace, emoji_folder: Path, host: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """A compact model, its U-Net in diffusers, and stirred experts of it in models/sun."""
    model, unet = make_small(emoji.model, emoji_folder, (1, 1, 2, 1))
    original = UNet2DConditionModel.from_pretrained(emoji_folder / "unet").float()
    experts = experts_for(original, unet, Plan(REMOVED, shape_of(original.config)))
    torch.manual_seed(1)
    with torch.no_grad():
        for _, layer in experts.by_name():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            layer.choose.weight.mul_(20)
    file = host.base / "models" / "sun" / "small.experts.safetensors"
    write_experts(experts, file, torch.float32)
    yield SimpleNamespace(model=model, unet=unet, file=file)
    file.unlink()


@pytest.fixture
def apply(host: SimpleNamespace, small: SimpleNamespace) -> Any:
    def put_on(model: Any = None, name: str = "small.experts.safetensors") -> Any:
        return host.nodes["SUN_ApplyExperts"].execute(model or small.model, name).result[0]

    return put_on


@pytest.fixture
def calls(small: SimpleNamespace) -> Iterator[list[Any]]:
    """(inputs, answer) of every call of the U-Net."""
    seen: list[Any] = []
    hook = small.model.model.diffusion_model.register_forward_hook(
        lambda _m, args, kwargs, output: seen.append((args[0], args[1], kwargs["context"], output)),
        with_kwargs=True,
    )
    yield seen
    hook.remove()


def test_it_is_listed_where_it_belongs(host: SimpleNamespace, small: SimpleNamespace) -> None:
    folders = host.pack.nodes.folders
    assert folders.experts() == ["small.experts.safetensors"]
    assert "small.experts.safetensors" not in folders.names()


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_a_call_is_diffusers(
    run: SimpleNamespace, small: SimpleNamespace, apply: Any, calls: list[Any], cfg: float
) -> None:
    """With guidance both prompts of a picture share a routing, in a batch of pictures each has its own."""
    plain = run.ksampler(small.model, cfg=cfg, steps=2, start=run.latent(batch=2))
    calls.clear()
    mixed = run.ksampler(apply(), cfg=cfg, steps=2, start=run.latent(batch=2))
    assert relative(mixed, plain) > 1e-3
    attach_experts(small.unet, read_experts(small.file))
    for x, t, text, answer in calls:
        assert len(x) == (2 if cfg == 1.0 else 4)
        with torch.no_grad():
            assert relative(answer, small.unet(x, t, text).sample) < 1e-4
    assert torch.equal(run.ksampler(small.model, cfg=cfg, steps=2, start=run.latent(batch=2)), plain)
    modules = list(small.model.model.diffusion_model.modules())
    assert not any("_conv_forward" in vars(module) for module in modules)


def test_an_error_in_the_middle_leaves_nothing(run: SimpleNamespace, small: SimpleNamespace, apply: Any) -> None:
    unet = small.model.model.diffusion_model

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    hook = unet.out.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        run.ksampler(apply(), steps=1)
    hook.remove()
    assert not any("_conv_forward" in vars(module) or module._forward_pre_hooks for module in unet.modules())


def test_lora_sun_and_ltc_accel_work_with_them(
    host: SimpleNamespace, run: SimpleNamespace, small: SimpleNamespace, apply: Any
) -> None:
    """A weight patch of a mixed convolution acts; SUN's node behind and before gives the same."""
    key = "diffusion_model.input_blocks.1.0.out_layers.3.weight"
    patched = apply().clone()
    change = torch.randn(small.unet.down_blocks[0].resnets[0].conv2.weight.shape) * 0.05
    patched.add_patches({key: ("diff", (change,))}, 1.0)
    assert relative(run.ksampler(patched, steps=1), run.ksampler(apply(), steps=1)) > 1e-4
    after, before = run.sun(run.apply(apply()), steps=2), run.sun(apply(run.apply(small.model)), steps=2)
    assert torch.equal(after, before)
    assert relative(after, run.sun(run.apply(small.model), steps=2)) > 1e-4
    ltc = host.nodes["SUN_ApplyLtcAccel"].execute(apply(), "balanced").result[0]
    assert run.ksampler(ltc, steps=8).isfinite().all()


def test_another_model_is_refused(emoji: SimpleNamespace, apply: Any, host: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="for another compact U-Net"):
        apply(emoji.model)
    wrong = host.base / "models" / "sun" / "wrong.experts.safetensors"
    wrong.write_bytes(b"{" * 99)
    try:
        with pytest.raises(ValueError, match="not a safetensors file"):
            apply(name=wrong.name)
    finally:
        wrong.unlink()
    with pytest.raises(FileNotFoundError):
        apply(name="../secret.safetensors")
    # a user without any such file has an empty list, and is told where they belong
    assert "No file of experts named ''" in host.nodes["SUN_ApplyExperts"].validate_inputs(experts="")
