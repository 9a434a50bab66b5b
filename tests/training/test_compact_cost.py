"""What distilling a compact U-Net costs, computed on tensors without content."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from sun.common.settings import apply, read_config
from sun.compact import CompactError, Plan, shape_of, write_plan
from sun.compact.structure import named_list
from sun.training.compact.settings import CompactTrainConfig, check_compact
from sun.training.cost.benchmark import Models
from sun.training.cost.distilling import estimate_compact

EMOJI_PLAN = Path(__file__).resolve().parents[2] / "sun" / "models" / "emoji-compact" / "plan.json"


def tiny() -> Models:
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(block_out_channels=(32, 32, 32, 32), cross_attention_dim=32, attention_head_dim=2)
    text = CLIPTextConfig(
        vocab_size=10, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return Models(unet, CLIPTextModel(text), AutoencoderTiny(), torch.linspace(1, 0.01, 1000))


@functools.cache
def cost(**values: object) -> dict[str, Any]:
    settings = {"resolution": 64, "cache": "latents+text", "plan": "shallow", **values}
    return estimate_compact(apply(CompactTrainConfig(), {**settings, "run": {"batch_size": 2}}), tiny)


def test_a_smaller_student_costs_less() -> None:
    shallow, base = cost(), cost(plan="bk-base")
    assert base["trained_parameters"] < shallow["trained_parameters"]
    assert base["tflop_per_picture"] < shallow["tflop_per_picture"]
    assert 0 < base["memory_gib"] < shallow["memory_gib"]


def test_a_plan_of_another_u_net_is_refused() -> None:
    """Costs are computed of Stable Diffusion 1.5's."""
    with pytest.raises(CompactError, match=r"another U-Net than Stable Diffusion 1\.5's"):
        cost(plan=str(EMOJI_PLAN))


@pytest.mark.slow  # a third computation of the same kind
def test_experts_cost_more_and_a_plan_s_file_is_read(tmp_path: Path) -> None:
    base = cost(plan="bk-base")
    shape = shape_of(tiny().unet.config)
    file = write_plan(Plan(named_list("bk-base", shape), shape), tmp_path / "plan.json")
    mixing = cost(plan=str(file), experts=4)
    assert mixing["trained_parameters"] > base["trained_parameters"]
    assert mixing["memory_gib"] > base["memory_gib"]


@pytest.mark.parametrize("name", ["compact-sd15-24gb", "compact-sd15-4xa100", "compact-emoji"])
def test_presets_are_settings_that_can_work(name: str) -> None:
    file = Path(__file__).resolve().parents[2] / "configs" / f"{name}.toml"
    check_compact(apply(CompactTrainConfig(), read_config(file)))
