"""``sun bench-runtimes``: what is measured, and what is computed of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from sun.runtimes import timing
from sun.surgery import from_unet

pytest.importorskip("onnxruntime", reason='the tests of exports need the extra: pip install -e ".[export]"')
pytest.importorskip("onnx", reason='the tests of exports need the extra: pip install -e ".[export]"')


def test_every_kind_is_measured_and_pictures_are_computed_of_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    models = SimpleNamespace(unet=unet, vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))
    monkeypatch.setattr(timing, "tiny_decoder", lambda models: models.vae)
    adapter = from_unet(unet, positive=True)
    timing.write_graphs(models, adapter, tmp_path, [("onnx", "fp32")])
    threads = torch.get_num_threads()
    try:
        rounds = {
            "torch": [timing.measure_torch(models, adapter, False, 64, 1)],
            "onnx-fp32": [timing.measure_graphs(tmp_path, "onnx", "fp32", 64, 1)] * 2,
        }
    finally:
        torch.set_num_threads(threads)
    table = timing.summary(rounds)
    for row in table.values():
        call, plain, full = (row[f"{name}_processor_seconds"] for name in ("sun", "plain", "full"))
        assert min(call, plain, full) > 0
        assert row["picture_full_processor_seconds"] == pytest.approx(4 * call + full)
        assert row["reference_full_processor_seconds"] == pytest.approx(50 * plain + full)
        assert row["sun_ratio_processor_seconds"] == pytest.approx(call / plain)
        assert row["memory_gib"] > 0
