"""Whatever ends a run, the next one is right and nothing stays patched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def models(short: SimpleNamespace) -> SimpleNamespace:
    return short


PICTURES: dict[str, torch.Tensor] = {}  # with SUN and without, before anything went wrong


def patched_state(model) -> dict[str, object]:
    """What a run could leave behind on a model: options, hooks, forwards, the running patcher."""
    unet = model.model.diffusion_model
    return {
        "options": sorted(model.model_options["transformer_options"]),
        "patcher": model.model.current_patcher,
        "modules": {name: sorted(module.__dict__) for name, module in unet.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in unet.named_modules()},
    }  # fmt: skip


PLACES = [(kind, where, call) for kind in ("error", "memory") for where in ("attention", "out") for call in range(4)]


@pytest.mark.parametrize(
    ("kind", "where", "call"),
    [pytest.param(*place, marks=[pytest.mark.slow] if place[2] in (1, 2) else []) for place in PLACES],
)
def test_the_next_run_is_right(
    host: SimpleNamespace, run: SimpleNamespace, emoji: SimpleNamespace, adapter, kind: str, where: str, call: int
) -> None:
    """The exception comes out of SUN's own attention, or out of the U-Net, at each of the four steps."""
    from comfy import model_management

    error = {
        "error": RuntimeError("broken"),
        "memory": model_management.OOM_EXCEPTION("Tried to allocate 20.00 GiB"),
    }[kind]
    model = run.apply()
    if not PICTURES:
        PICTURES.update(sun=run.sun(model), plain=run.ksampler(emoji.model))
    before = patched_state(model)
    patch, layers = host.part("nodes.sun_patch"), len(adapter.adapter.layers)
    original, calls = patch.sun_attention, iter(range(100))

    def attend(*arguments: Any) -> torch.Tensor:
        if next(calls) == call * layers + 2:  # the third layer of a step
            raise error
        return original(*arguments)

    def stop(*_: Any) -> None:
        if next(calls) == call:
            raise error

    with pytest.MonkeyPatch.context() as patched:
        if where == "attention":
            patched.setattr(patch, "sun_attention", attend)
            with pytest.raises(type(error)):
                run.sun(model)
        else:
            handle = model.model.diffusion_model.out.register_forward_pre_hook(stop)
            try:
                with pytest.raises(type(error)):
                    run.sun(model)
            finally:
                handle.remove()
    assert patched_state(model) == before
    assert torch.equal(run.ksampler(emoji.model), PICTURES["plain"])
    assert torch.equal(run.sun(model), PICTURES["sun"])
