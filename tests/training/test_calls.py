"""U-Net calls of training, counted alike for SUN and its peers, so that they can have one budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_unet
from torch import nn

from sun import SunAdapter
from sun.common.settings import ConfigError
from sun.lab.peers.guided_distillation import GuidedDistillConfig, train_guided_distillation
from sun.lab.peers.lcm_lora import LcmLoraConfig, train_lcm_lora
from sun.training.calls import UNetCalls
from sun.training.config import RunConfig, SunTrainConfig
from sun.training.run import TrainingRun
from sun.training.sun import train_sun

BATCH = 2
TEACHER = 2 * 2 * BATCH  # two sub-steps, both prompts
STUDENT = 3 * BATCH  # forward and backward
GUIDED_STEP, TARGET = 2 * BATCH, BATCH  # of latent consistency distillation


def run_config(output: Path, **run: Any) -> RunConfig:
    return RunConfig(output=str(output), **{"steps": 3, "batch_size": BATCH, "precision": "fp32", **run})


def shared(model: Path, data: Path) -> dict[str, Any]:
    return {"model": str(model), "data": str(data), "resolution": 64, "guidance_scale": 3.0}


def sun_calls(
    model: Path, data: Path, output: Path, changes: dict[str, Any] | None = None, **run: Any
) -> dict[str, Any]:
    settings = {"substeps": 2, "replace_probability": 0.0, **shared(model, data), **(changes or {})}
    file = train_sun(SunTrainConfig(run=run_config(output, **run), max_negative_phrases=5, **settings))
    return SunAdapter.load(file).info.training


def test_a_forward_pass_is_one_call_a_picture_and_a_backward_pass_two() -> None:
    unet, text, calls = make_unet(), torch.zeros(3, 77, 16), UNetCalls()
    calls.watch(unet)
    with torch.no_grad():
        unet(torch.zeros(3, 4, 8, 8), 1, text)
    assert calls.take() == 3
    unet(sample=torch.zeros(2, 4, 8, 8), timestep=1, encoder_hidden_states=text[:2], return_dict=False)
    assert calls.take() == 2 * 3
    unet.requires_grad_(False)
    unet(torch.zeros(1, 4, 8, 8), 1, text[:1])  # nothing of it learns
    assert (calls.take(), calls.take()) == (1, 0)


def test_suns_calls_are_those_of_teacher_and_student(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    done = sun_calls(tiny_model, pictures, tmp_path / "one", sample_minutes=0.0)
    assert done["unet_calls"] == 3 * (TEACHER + STUDENT)  # the pictures drawn to look at are no training
    rows = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["unet_calls"] == done["unet_calls"]
    twice = sun_calls(tiny_model, pictures, tmp_path / "two", steps=1, accumulate=2)
    assert twice["unet_calls"] == 2 * (TEACHER + STUDENT)
    reused = sun_calls(tiny_model, pictures, tmp_path / "reuse", {"target_reuse": 2}, steps=2)
    assert reused["unet_calls"] == TEACHER + 2 * STUDENT


def test_a_run_ends_at_its_number_of_calls_and_a_resumed_one_counts_on(
    tiny_model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    each = TEACHER + STUDENT
    first = sun_calls(tiny_model, pictures, tmp_path / "run", steps=100, unet_calls=each + 1)
    assert (first["step"], first["unet_calls"]) == (2, 2 * each)
    assert f"{2 * each:,} U-Net calls of training" in capsys.readouterr().out
    second = sun_calls(tiny_model, pictures, tmp_path / "run", steps=100, unet_calls=3 * each)
    assert (second["step"], second["unet_calls"]) == (3, 3 * each)


def test_the_peers_count_their_calls_and_say_so(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    expected = {"lcm": GUIDED_STEP + TARGET + STUDENT, "distill": TEACHER + STUDENT}
    common = shared(tiny_model, pictures)
    budget = {"steps": 100, "unet_calls": 2 * max(expected.values())}
    lcm = train_lcm_lora(LcmLoraConfig(run=run_config(tmp_path / "lcm", **budget), rank=2, **common))
    distill = train_guided_distillation(
        GuidedDistillConfig(
            run=run_config(tmp_path / "distill", **budget), substeps=2, replace_probability=0.0, **common
        )
    )
    for folder in (lcm, distill):
        progress = json.loads((folder / "training.json").read_text())["progress"]
        assert progress["unet_calls"] == progress["step"] * expected[folder.name]
        assert 0 <= progress["unet_calls"] - budget["unet_calls"] < expected[folder.name]
        assert (
            f"| U-Net calls of training (forward 1, backward 2) | {progress['unet_calls']} |"
            in (folder / "README.md").read_text()
        )


def test_a_training_without_a_unet_has_no_calls_to_end_at(tmp_path: Path) -> None:
    run = TrainingRun(run_config(tmp_path / "run", unet_calls=5), {"net": nn.Linear(1, 1)})
    with pytest.raises(ConfigError, match="unet_calls"):
        next(iter(run.steps()))


def test_encoding_pictures_takes_nothing_of_a_budget_of_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of our own: an hour of encoding in the first step, then steps of a minute."""
    clock = [0.0]
    monkeypatch.setattr("sun.training.run.time.monotonic", lambda: clock[0])
    run = TrainingRun(run_config(tmp_path / "run", steps=100, minutes=3.0), {"net": nn.Linear(1, 1)})
    steps = 0
    for _ in run.steps():
        if not steps:
            with run.preparing():
                clock[0] += 3600.0
        clock[0] += 60.0
        steps += 1
        run.update(run.modules["net"](torch.ones(1, 1)).square().mean())
    assert (steps, run.progress.seconds) == (3, 180.0)
