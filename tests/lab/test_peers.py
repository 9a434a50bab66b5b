"""LCM-LoRA and guided distillation on a tiny model: equations, what trains, what is written, interruptions."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from typer.testing import CliRunner

from sun.cli import app
from sun.common.settings import ConfigError, apply, read_config
from sun.lab.emoji.base import sd15_scheduler
from sun.lab.peers import lcm_lora
from sun.lab.peers.guided_distillation import GuidedDistillConfig, train_guided_distillation
from sun.lab.peers.lcm_lora import (
    TARGETS,
    LcmLoraConfig,
    LoraStudent,
    consistency,
    draw_timesteps,
    guided_step,
    like_sun,
    parameters_per_rank,
    train_lcm_lora,
)
from sun.lab.peers.setup import Batch
from sun.pipelines.schedulers import make_scheduler
from sun.surgery import from_unet
from sun.training.algorithm import NoiseSchedule, pseudo_huber
from sun.training.config import RunConfig
from sun.training.run import TrainingRun

CONFIGS = Path(__file__).parents[2] / "configs"
Train = Callable[[Any], Path]
SIZE = 64


def lcm(model: Path, data: Path, output: Path, **run: Any) -> LcmLoraConfig:
    return LcmLoraConfig(
        run=settings(output, **run),
        model=str(model),
        data=str(data),
        guidance_scale=3.0,
        rank=2,
        resolution=SIZE,
    )


def distill(model: Path, data: Path, output: Path, **run: Any) -> GuidedDistillConfig:
    return GuidedDistillConfig(
        run=settings(output, **run), model=str(model), data=str(data), guidance_scale=3.0, substeps=2,
        replace_probability=0.5, target_reuse=2, resolution=SIZE,
    )  # fmt: skip


def settings(output: Path, **run: Any) -> RunConfig:
    return RunConfig(output=str(output), **{"steps": 3, "batch_size": 2, "ema_decay": 0.5, "precision": "fp32", **run})


BOTH = pytest.mark.parametrize(
    ("make", "train"),
    [(lcm, train_lcm_lora), (distill, train_guided_distillation)],
    ids=["lcm-lora", "guided-distill"],
)

FIRST = pytest.mark.parametrize(
    ("make", "train"),
    [
        pytest.param(lcm, train_lcm_lora, id="lcm-lora"),
        pytest.param(distill, train_guided_distillation, id="guided-distill", marks=pytest.mark.slow),
    ],
)
"""The same where both go through the same code, which the first alone shows in `make test`."""


# --- the equations -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule(sd15_scheduler().alphas_cumprod)


@pytest.mark.parametrize("t", [19, 259, 499, 759, 999])
def test_the_consistency_function_is_the_one_lcm_samples_with(t: int, schedule: NoiseSchedule) -> None:
    scheduler = LCMScheduler.from_config(sd15_scheduler().config)
    x, noise = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(50)
    expected = scheduler.step(noise, torch.tensor(t), x).denoised
    torch.testing.assert_close(consistency(x, noise, torch.tensor([t]), schedule, scheduler), expected)


def test_the_consistency_function_is_the_identity_at_the_end(schedule: NoiseSchedule) -> None:
    scheduler = LCMScheduler.from_config(sd15_scheduler().config)
    x, noise = torch.randn(2, 3, 4, 2, 2)
    torch.testing.assert_close(consistency(x, noise, torch.zeros(3).long(), schedule, scheduler), x)


def test_timesteps_are_those_of_lcms_grid() -> None:
    t, s = draw_timesteps(2000, 20, 1000, random.Random(0))
    scheduler = LCMScheduler.from_config(sd15_scheduler().config)
    scheduler.set_timesteps(50)
    assert set(t.tolist()) == set(scheduler.timesteps.tolist())
    assert all(end == max(0, start - 20) for start, end in zip(t.tolist(), s.tolist(), strict=True))
    scheduler.set_timesteps(4)
    assert set(scheduler.timesteps.tolist()) <= set(t.tolist())


@dataclass
class Prediction:
    sample: Tensor


@dataclass
class FakeUnet:
    """Noise that shows what it was computed from: mean of the text states plus t / 1000."""

    rows: list[int] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, text: Tensor) -> Prediction:
        self.rows.append(len(x))
        return Prediction((text.mean((1, 2)) + t / 1000).view(-1, 1, 1, 1).expand_as(x))


def test_the_teachers_step_is_guided_row_by_row(schedule: NoiseSchedule) -> None:
    unet, x = FakeUnet(), torch.randn(2, 4, 2, 2)
    batch = Batch(x, torch.full((2, 3, 5), 0.7), torch.full((2, 3, 5), -0.2))
    t, s, w = torch.tensor([999, 39]), torch.tensor([979, 19]), torch.tensor([4.0, 7.5])
    stepped = guided_step(unet, x, t, s, batch, w, schedule)
    assert unet.rows == [4]
    abar = sd15_scheduler().alphas_cumprod.double()
    for row in range(2):
        shift = int(t[row]) / 1000
        noise = (-0.2 + shift) + float(w[row]) * (0.7 - -0.2)
        clean = (x[row] - (1 - abar[t[row]]) ** 0.5 * noise) / abar[t[row]] ** 0.5
        expected = abar[s[row]] ** 0.5 * clean + (1 - abar[s[row]]) ** 0.5 * noise
        torch.testing.assert_close(stepped[row], expected.float(), rtol=1e-4, atol=1e-4)


# --- what trains -------------------------------------------------------------------------------------------------


def test_only_the_lora_trains_and_it_starts_at_nothing(tiny_model: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet").requires_grad_(False)
    arguments = torch.randn(2, 4, 4, 4), torch.tensor([999, 249]), torch.randn(2, 77, 32)
    with torch.no_grad():
        before = unet(*arguments).sample
    rank = like_sun(unet, TARGETS)
    per_rank = parameters_per_rank(unet, TARGETS)
    student = LoraStudent(unet, rank, TARGETS)
    assert sum(p.numel() for p in student.parameters()) == rank * per_rank
    assert all(p.requires_grad for p in student.parameters())
    torch.testing.assert_close(student(*arguments), before)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert not torch.allclose(student(*arguments), before, atol=1e-3)
    with student.without_lora() as plain, torch.no_grad():
        assert torch.equal(plain(*arguments).sample, before)
    student(*arguments).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    trained = {id(p) for p in student.parameters()}
    assert all(p.grad is None for p in unet.parameters() if id(p) not in trained)


def test_the_rank_makes_the_lora_as_large_as_a_sun_adapter(tiny_model: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    wanted = sum(p.numel() for p in from_unet(unet).parameters())
    per_rank = parameters_per_rank(unet, TARGETS)
    assert abs(like_sun(unet, TARGETS) * per_rank - wanted) <= per_rank / 2 or like_sun(unet, TARGETS) == 1
    with pytest.raises(ConfigError, match="no layer named nonsense"):
        like_sun(unet, ("nonsense",))


def test_the_lora_is_written_for_any_diffusers_pipeline(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    folder = train_lcm_lora(lcm(tiny_model, pictures, tmp_path / "run", lr=0.05))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    arguments = torch.randn(2, 4, 4, 4), torch.tensor(999), torch.randn(2, 77, 32)
    with torch.no_grad():
        before = pipe.unet(*arguments).sample
        pipe.load_lora_weights(folder)
        after = pipe.unet(*arguments).sample
    assert len(pipe.unet.peft_config) == 1
    assert not torch.allclose(after, before, atol=1e-4)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(["snake", "owl"], num_inference_steps=4, guidance_scale=1.0).images) == 2
    assert list((tmp_path / "run" / "samples").glob("*.png"))


@pytest.mark.parametrize("recipe", [{}, {"trajectories": True, "msc_error": "state", "replace_depth": 2}])
def test_the_distilled_unet_is_written_as_a_diffusers_folder(
    tiny_model: Path, pictures: Path, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    base = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    config = replace(distill(tiny_model, pictures, tmp_path / "run", lr=5e-3), **recipe)
    folder = train_guided_distillation(config)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    moved = [(a - b).abs().max() for a, b in zip(unet.parameters(), base.parameters(), strict=True)]
    still = [n for (n, _), m in zip(unet.named_parameters(), moved, strict=True) if m == 0]
    assert not still, "every weight trains, by more than fp16 rounds away"
    assert "_name_or_path" not in json.loads((folder / "unet" / "config.json").read_text())
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, unet=unet, safety_checker=None)
    pipe.scheduler = make_scheduler("ddim", pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(["snake", "owl"], num_inference_steps=4, guidance_scale=1.0).images) == 2
    assert list((tmp_path / "run" / "samples").glob("*.png"))


@BOTH
def test_the_card_says_how_it_was_made_and_nothing_of_this_machine(
    make: Callable[..., Any], train: Train, tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = train(make(tiny_model, pictures, tmp_path / "run", steps=1))
    content = json.loads((folder / "training.json").read_text())
    assert content["settings"]["guidance_scale"] == 3.0
    assert content["settings"]["data"] == pictures.name
    assert content["base_model"] == tiny_model.parent.name
    assert content["progress"]["step"] == 1
    card = (folder / "README.md").read_text()
    assert "guidance scale w | 3.0" in card
    for text in (card, (folder / "training.json").read_text()):
        assert str(tmp_path.parent) not in text


# --- interruptions -----------------------------------------------------------------------------------------------


@FIRST
def test_a_run_that_was_interrupted_ends_with_the_weights_of_one_that_was_not(
    make: Callable[..., Any], train: Train, tiny_model: Path, pictures: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole = train(make(tiny_model, pictures, tmp_path / "whole", checkpoint_minutes=0.0))
    update, calls = TrainingRun.update, []

    def interrupted(self: TrainingRun, *args: Tensor, **named: Tensor) -> None:
        calls.append(self.progress.step)
        if len(calls) == 3:
            raise KeyboardInterrupt
        update(self, *args, **named)

    monkeypatch.setattr(TrainingRun, "update", interrupted)
    config = make(tiny_model, pictures, tmp_path / "broken", checkpoint_minutes=0.0)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    broken = train(config)
    assert calls == [0, 1, 2, 2]
    assert weights_of(whole).read_bytes() == weights_of(broken).read_bytes()


def weights_of(folder: Path) -> Path:
    found = [*folder.glob("pytorch_lora_weights.safetensors"), *folder.glob("unet/*.safetensors")]
    assert len(found) == 1
    return found[0]


@pytest.fixture
def _new_accelerator() -> Iterator[None]:
    """accelerate keeps its precision for the whole process; other tests use another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@FIRST
@pytest.mark.usefixtures("_new_accelerator")
def test_training_in_bfloat16(
    make: Callable[..., Any], train: Train, tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = train(make(tiny_model, pictures, tmp_path / "run", precision="bf16", frozen="bf16", steps=2))
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert weights_of(folder).exists()


@pytest.mark.usefixtures("_new_accelerator")
def test_the_student_does_not_run_on_autocasts_copies_of_the_averaged_weights(
    tiny_model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_targets, update, made, losses = lcm_lora.new_targets, TrainingRun.update, [], []

    def recorded(config: LcmLoraConfig, work: Any, student: Any, scheduler: Any) -> Any:
        made.append((new_targets(config, work, student, scheduler), work, student, scheduler))
        return made[-1][0]

    def checked(self: TrainingRun, loss: Tensor) -> None:
        (x_t, t, positive, target), work, student, scheduler = made[-1]
        with torch.no_grad(), self.accelerator.autocast():
            again = consistency(x_t, student(x_t, t, positive), t, work.schedule, scheduler)
        losses.append((loss.detach(), pseudo_huber(again - target, 0.001).mean()))
        update(self, loss)

    monkeypatch.setattr(lcm_lora, "new_targets", recorded)
    monkeypatch.setattr(TrainingRun, "update", checked)
    train_lcm_lora(lcm(tiny_model, pictures, tmp_path / "run", precision="bf16", lr=0.05, steps=2))
    assert len(losses) == 2
    for loss, fresh in losses:
        torch.testing.assert_close(loss, fresh, rtol=1e-6, atol=0.0)


# --- the command line and its settings ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["lcm-lora", "guided-distill"])
def test_the_command_trains(command: str, tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    arguments = ["train-peer", command, "--config", CONFIGS / f"peers-{command}.toml", "--model", tiny_model,
                 "--data", pictures, "--output", tmp_path / "run", "--steps", 1, "--set", "batch_size=2",
                 "--set", "precision=fp32"]  # fmt: skip
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert weights_of(tmp_path / "run").exists()


def test_configs_hold_known_settings() -> None:
    assert apply(LcmLoraConfig(), read_config(CONFIGS / "peers-lcm-lora.toml")).guidance_scale == 1.5
    assert apply(GuidedDistillConfig(), read_config(CONFIGS / "peers-guided-distill.toml")).guidance_scale == 1.5


@pytest.mark.parametrize(
    ("change", "message"),
    [({"guidance_scale_max": 2.0}, "fixed w"), ({"skipping_step": 0}, "skipping_step"), ({"rank": -1}, "rank")],
)
def test_settings_that_cannot_be_trained_with(change: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_lcm_lora(LcmLoraConfig(**change))  # type: ignore[arg-type]


def test_a_model_that_does_not_predict_noise_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(ConfigError, match="v_prediction"):
        train_lcm_lora(LcmLoraConfig(model=str(tmp_path / "model")))
