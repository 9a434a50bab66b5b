"""``sun train-benchmark``: figures of the real training step, measured or computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from sun.common.settings import apply, read_config
from sun.training.config import RunConfig, SunTrainConfig
from sun.training.cost.benchmark import Models, measure
from sun.training.cost.estimate import estimate

PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("sd15-*.toml"))


def config(**settings: object) -> SunTrainConfig:
    run = RunConfig(batch_size=2, accumulate=2, precision="fp32")
    return SunTrainConfig(**{"run": run, "substeps": 2, "guidance_scale": 3.0, "resolution": 64, **settings})


def small() -> Models:
    text = CLIPTextConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=2,
    )  # fmt: skip
    return Models(unet, CLIPTextModel(text), AutoencoderKL(), torch.linspace(0.99, 0.01, 1000))


def test_a_measurement_counts_pictures_of_every_micro_batch(tiny_model: Path) -> None:
    figures = measure(config(), str(tiny_model), updates=2, warmup=1)
    assert figures["measured"]
    assert figures["pictures_per_update"] == 4
    assert figures["pictures_per_second"] == pytest.approx(4 / figures["seconds"], rel=1e-2)
    assert figures["memory_gib"] > 0


@pytest.fixture
def _any_precision() -> Iterator[None]:
    """accelerate holds a process to the first run's number format; these tests choose another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_any_precision")
def test_the_command_measures_a_preset(tiny_model: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from sun.cli import benchmark
    from sun.cli.app import app

    assert benchmark
    small_pictures = ["--set", "resolution=128", "--set", "substeps=1", "--set", "run.batch_size=1"]
    arguments = ["--config", str(PRESETS[0]), "--model", str(tiny_model), "--updates", "1", *small_pictures]
    done = CliRunner().invoke(app, ["train-benchmark", *arguments, "--json", str(tmp_path / "figures.json")])
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["pictures_per_update"] == 4
    assert figures["gradient_checkpointing"]


def test_an_estimate_knows_what_saves_memory_and_what_costs_arithmetic() -> None:
    plain = estimate(config(cache="latents", substeps=1), small)
    checkpointed = estimate(config(cache="latents", substeps=1, gradient_checkpointing=True), small)
    assert checkpointed["memory_gib"] < plain["memory_gib"]
    assert checkpointed["tflop_per_picture"] > plain["tflop_per_picture"]
    assert estimate(config(cache="latents", substeps=2), small)["tflop_per_picture"] > plain["tflop_per_picture"]
    parameters = sum(p.numel() for p in small().unet.parameters())
    assert plain["memory_gib"] > 4 * parameters / 2**30


@pytest.mark.parametrize("preset", PRESETS, ids=[p.stem for p in PRESETS])
def test_presets_are_the_papers_batch(preset: Path) -> None:
    chosen = apply(SunTrainConfig(), read_config(preset))
    processes = {"sd15-4xa100": 4, "sd15-8xv100": 8, "sd15-24gb": 1}[preset.stem]
    pictures = chosen.run.batch_size * chosen.run.accumulate * processes
    assert (pictures, chosen.run.steps) in ((32, 5000), (8, 20000))
    assert chosen.guidance_scale == 8.0
    assert chosen.run.lr == 1e-4


def test_there_are_three_presets() -> None:
    assert len(PRESETS) == 3
