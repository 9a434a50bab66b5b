"""LTC-Accel's presets on larger models of diffusers: they run, skip what they say, and are as before afterwards."""

from __future__ import annotations

import pytest
import torch
from larger_models import LARGER

import sun.ltc


@pytest.mark.parametrize("name", LARGER)
def test_larger_models_skip_a_third_and_are_restored(name: str) -> None:
    pipe, arguments = LARGER[name]()
    pipe.set_progress_bar_config(disable=True)
    own, denoiser = type(pipe), getattr(pipe, "unet", None) or pipe.transformer
    calls: list[int] = []  # of a part: hooks of the whole count skipped calls too
    last = getattr(denoiser, "conv_out", None) or denoiser.proj_out
    last.register_forward_hook(lambda *_: calls.append(1))

    def draw() -> torch.Tensor:
        calls.clear()
        return pipe(
            **arguments, num_inference_steps=12, output_type="latent", return_dict=False,
            generator=torch.manual_seed(1),
        )[0]  # fmt: skip

    plain = draw()
    passes = len(calls) // 12  # Wan runs the two of guidance one after the other
    sun.ltc.attach(pipe, guard=0)
    fast = draw()
    assert sun.ltc.last_run(pipe) == sun.ltc.Counts(8, 12)
    assert len(calls) == 8 * passes
    assert fast.isfinite().all()
    assert 0 < (fast - plain).norm() < 0.7 * plain.norm()
    assert torch.equal(draw(), fast)
    sun.ltc.detach(pipe)
    assert type(pipe) is own
    assert torch.equal(draw(), plain)
    assert len(calls) == 12 * passes
