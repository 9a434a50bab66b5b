"""Peers that are written from a formula for evaluation, beside the real ones in ComfyUI."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_host import load_builtin_extras

from sun.evaluation.peers.easycache import CacheSettings, EasyCache, LazyCache
from sun.evaluation.peers.step_skipping import Moment

STEPS, THRESHOLD = 14, 0.35


def with_ours(model: Any, skipper: EasyCache | LazyCache) -> tuple[Any, list[float]]:
    """The model with our peer in ComfyUI's sampling; the noise levels at which it left the model out are listed."""
    from comfy.patcher_extension import WrappersMP

    model, sampling, skipped = model.clone(), model.model.model_sampling, []
    rows: dict[int, torch.Tensor] = {}

    def unet(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        passes = args[-1] if isinstance(args[-1], dict) else kwargs["transformer_options"]
        for kind, part in zip(passes["cond_or_uncond"], out.chunk(len(passes["cond_or_uncond"])), strict=True):
            rows[kind] = part[0]
        return out

    def predict(executor, x, timestep, *args):
        sigma = float(timestep[0])
        alpha = (1 + sigma**2) ** -0.5
        time = float(sampling.timestep(timestep[0]))
        at = Moment(0, STEPS, x[0], x[0] * alpha, alpha, sigma * alpha, time, 0.0, len(sampling.sigmas), 0.0)
        forecast = skipper.forecast(at)
        if forecast is not None:
            skipped.append(sigma)
            return x - sigma * forecast
        clean = executor(x, timestep, *args)
        skipper.learn(at, ((x - clean) / sigma)[0], torch.stack([rows[0], rows[1]]))
        return clean

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", unet)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", predict)
    return model, skipped


@pytest.mark.slow  # four pictures of the shipped model
@pytest.mark.parametrize(("node", "ours"), [("EasyCache", EasyCache), ("LazyCache", LazyCache)])
def test_caches_are_comfyuis_own(
    host: SimpleNamespace,
    run: SimpleNamespace,
    emoji: SimpleNamespace,
    node: str,
    ours: type[EasyCache] | type[LazyCache],
) -> None:
    load_builtin_extras("nodes_easycache")
    theirs = host.nodes[node].execute(emoji.model, THRESHOLD, 0.15, 0.95, False).result[0]
    embedded: list[int] = []  # EasyCache acts inside of the U-Net's forward, before this part of it
    part = emoji.model.model.diffusion_model.time_embed
    handle = part.register_forward_hook(lambda *_: embedded.append(1))
    try:
        expected = run.ksampler(theirs, steps=STEPS, cfg=3.0)
        calls = len(embedded)
        model, skipped = with_ours(emoji.model, ours(CacheSettings(THRESHOLD)))
        made = run.ksampler(model, steps=STEPS, cfg=3.0)
    finally:
        handle.remove()
    assert 0 < len(skipped) < STEPS - 5
    assert len(embedded) - calls == calls
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)
