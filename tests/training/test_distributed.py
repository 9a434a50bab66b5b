"""Several processes, accumulated gradients and resumed runs train what one uninterrupted process trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from torch import nn

from sun import SunAdapter
from sun.common.settings import ConfigError, apply, read_config
from sun.surgery import from_unet
from sun.training import run as run_module
from sun.training import sun as sun_module
from sun.training.checkpoint import find_checkpoint, publish, start_checkpoint
from sun.training.config import RunConfig, SunTrainConfig
from sun.training.run import NonFiniteLoss, TrainingRun, start_run
from sun.training.sun import train_sun


@pytest.fixture(autouse=True)
def _no_sample_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sun_module, "sample_grid", lambda *_: None)


def settings(model: Path, data: Path, output: Path, **run: Any) -> dict[str, Any]:
    """Checkpoints after every step, a replay buffer, replaced rows: everything a resumed run has to get right."""
    shared = {"steps": 4, "batch_size": 2, "lr": 1e-2, "precision": "fp32", "checkpoint_minutes": 0.0}
    return {
        "run": {"output": str(output), **shared, **run}, "model": str(model), "data": str(data), "substeps": 2,
        "replace_probability": 0.5, "max_negative_phrases": 5, "guidance_scale": 3.0, "target_reuse": 2,
        "resolution": 64,
    }  # fmt: skip


def train(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return SunAdapter.load(train_sun(apply(SunTrainConfig(), values)), dtype=torch.float32).state_dict()


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((a[k] - b[k]).square().sum()) for k in a) ** 0.5


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with `arguments`, on the CPU."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "ACCELERATE_USE_CPU": "true",
           "OMP_NUM_THREADS": "1"}  # fmt: skip
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=540)


def saved(values: dict[str, Any], folder: Path) -> str:
    """The file of these settings, made in `folder`."""
    file = folder / "settings.json"
    file.write_text(json.dumps(values))
    return str(file)


def launch(values: dict[str, Any], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Train with two CPU processes."""
    script = str(Path(__file__).parents[1] / "helpers" / "sun_process.py")
    return command("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone",
                   script, saved(values, folder), *arguments)  # fmt: skip


@pytest.mark.slow
def test_two_processes_one_killed_and_resumed_train_what_one_process_trains(
    tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    one = train(settings(tiny_model, pictures, tmp_path / "one", accumulate=2) | {"target_reuse": 1})
    start = from_unet(UNet2DConditionModel.from_pretrained(tiny_model / "unet")).state_dict()
    values = settings(tiny_model, pictures, tmp_path / "two") | {"target_reuse": 1}
    killed = launch(values, tmp_path, "3")
    assert killed.returncode != 0
    assert [row["step"] for row in log(tmp_path / "two")] == [1, 2, 3], killed.stderr[-3000:]
    resumed = launch(values, tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    two = SunAdapter.load(tmp_path / "two" / "adapter.safetensors", dtype=torch.float32).state_dict()
    rows = {row["step"]: row for row in log(tmp_path / "two")}
    for expected in log(tmp_path / "one")[:3]:  # the averages of the fourth begin anew with the resumed process
        assert rows[expected["step"]]["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    # As a share of what training changed: Adam turns rounding into whole steps where a gradient is almost 0.
    assert distance(one, two) < 0.05 * distance(one, start)


@pytest.mark.slow  # a process of its own
def test_accelerate_launch_trains_from_a_config(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    """The command the presets and the guide name, whole. On CPUs accelerate starts several processes only with MPI."""
    values = settings(tiny_model, pictures, tmp_path / "run", steps=1)
    done = command("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no",
                   "-m", "sun", "train", "--config", saved(values, tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert log(tmp_path / "run")[-1]["step"] == 1
    assert SunAdapter.load(tmp_path / "run" / "adapter.safetensors").layers


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    tiny_model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(settings(tiny_model, pictures, tmp_path / "whole", ema_decay=0.5))
    values = settings(tiny_model, pictures, tmp_path / "halves", ema_decay=0.5)
    update = run_module.TrainingRun.update

    def interrupted(self: TrainingRun, *args: torch.Tensor, **named: torch.Tensor) -> None:
        if self.progress.step == 3:
            raise KeyboardInterrupt
        update(self, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.TrainingRun, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(values)
    assert largest_difference(whole, train(values)) == 0.0


@pytest.fixture
def _any_precision() -> Iterator[None]:
    """accelerate holds a process to the first run's number format; these tests choose another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow  # bf16, which CPUs count slowly in; test_benchmark.py measures a preset
@pytest.mark.usefixtures("_any_precision")
def test_the_preset_for_a_small_card_trains(
    tiny_model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 weights, gradient checkpointing, accumulation, cached latents and text, all at once."""
    monkeypatch.setenv("SUN_CACHE", str(tmp_path / "cache"))
    preset = read_config(Path(__file__).parents[2] / "configs" / "sd15-24gb.toml")
    preset["run"] |= {"steps": 2, "output": str(tmp_path / "run"), "batch_size": 2, "accumulate": 2}
    preset |= {"model": str(tiny_model), "data": str(pictures), "resolution": 128, "substeps": 2}
    trained = train(preset)
    start = from_unet(UNet2DConditionModel.from_pretrained(tiny_model / "unet")).state_dict()
    assert 0 < largest_difference(trained, start) < 1e-2
    assert log(tmp_path / "run")[-1]["step"] == 2
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1


@pytest.mark.parametrize(("fast", "expected"), [(True, "bf16"), (False, "fp32")])
@pytest.mark.usefixtures("_any_precision")
def test_a_run_computes_in_bf16_where_the_device_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, expected: str
) -> None:
    monkeypatch.setattr("sun.common.devices.has_bf16", lambda _: fast)
    run = tiny_run(tmp_path / "run", precision="auto", steps=1)
    assert run.accelerator.mixed_precision == {"bf16": "bf16", "fp32": "no"}[expected]
    for _ in run.steps():
        run.update(sum(p.square().sum() for p in run.parameters))
    assert log(tmp_path / "run")[-1]["precision"] == expected


@pytest.mark.usefixtures("_any_precision")
def test_half_precision_weights_need_arithmetic_of_their_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sun.common.devices.has_bf16", lambda _: False)
    with pytest.raises(ConfigError, match="precision = bf16"):
        tiny_run(tmp_path / "run", precision="auto", frozen="bf16")


# --- TrainingRun alone -----------------------------------------------------------------------------------------------


def tiny_run(folder: Path, **values: Any) -> TrainingRun:
    torch.manual_seed(0)
    defaults = {"steps": 6, "precision": "fp32", "lr": 0.1, "checkpoint_minutes": 1e9}
    return TrainingRun(RunConfig(output=str(folder), **(defaults | values)), {"net": nn.Linear(3, 1)})


def fit(run: TrainingRun, rows: int) -> dict[str, torch.Tensor]:
    """A regression whose data is a function of the step and the micro-batch alone."""
    micro, last = 0, -1
    for step in run.steps():
        micro, last = (micro + 1 if step == last else 0), step
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 3, generator=generator)[rows * micro : rows * (micro + 1)]
        run.update((run.modules["net"](x) - x.sum(1, keepdim=True)).square().mean())
    return {k: v.clone() for k, v in run.unwrapped("net").state_dict().items()}


@pytest.mark.parametrize("optimizer", ["adamw", "fused"])
def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path: Path, optimizer: str) -> None:
    large = fit(tiny_run(tmp_path / "large", optimizer=optimizer), 4)
    small = fit(tiny_run(tmp_path / "small", optimizer=optimizer, accumulate=2), 2)
    assert largest_difference(large, small) < 1e-5
    assert [row["step"] for row in log(tmp_path / "small")] == [6]


@pytest.mark.parametrize("optimizer", ["adamw", "fused"])
@pytest.mark.usefixtures("_any_precision")
def test_fp16_gradients_that_always_overflow_stop_the_run(tmp_path: Path, optimizer: str) -> None:
    """A fused optimiser leaves such updates out by itself, so that accelerate counts none."""
    run = tiny_run(tmp_path / "run", optimizer=optimizer, steps=200)
    # What accelerate sets up on a GPU for fp16; the scale stays too large while it halves.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    run.optimizer = AcceleratedOptimizer(run.optimizer.optimizer, scaler=scaler)
    run.accelerator.scaler, run.accelerator._optimizers = scaler, [run.optimizer]
    run.accelerator.native_amp, run.accelerator.state._mixed_precision = True, "fp16"

    def train() -> None:
        for _ in run.steps():
            run.update(sum((1e30 * p).sum() for p in run.parameters))

    with pytest.raises(NonFiniteLoss, match="fp16 gradients overflowed in 51 updates in a row"):
        train()
    assert run.progress.step == 50


def test_every_step_draws_the_same_whatever_was_drawn_before(tmp_path: Path) -> None:
    def drawn(folder: Path, noisy: bool, **values: Any) -> list[tuple[float, float]]:
        run, found = tiny_run(folder, **values), []
        for _ in run.steps():
            found.append((run.rng.random(), torch.rand(1).item()))
            if noisy:
                torch.rand(5)
        return found

    plain = drawn(tmp_path / "a", noisy=False)
    assert plain == drawn(tmp_path / "b", noisy=True)
    assert len(set(plain)) == 6
    assert len(set(drawn(tmp_path / "c", noisy=False, accumulate=2, steps=3))) == 6


def test_a_run_with_other_settings_does_not_go_on_in_the_same_folder(tmp_path: Path) -> None:
    def begin(**changes: Any) -> TrainingRun:
        run = RunConfig(output=str(tmp_path / "run"), precision="fp32", **changes.pop("run", {}))
        return start_run(SunTrainConfig(run=run, **changes), {"net": nn.Linear(3, 1)})

    run = begin()
    run.progress.step = 3
    run.save()
    assert begin(run={"minutes": 5.0}, workers=2).progress.step == 3, "length and workers may change"
    with pytest.raises(ConfigError, match=r"model 'emoji', now 'other'.*--no-resume"):
        begin(model="other")
    anew = begin(model="other", run={"resume": False})
    assert anew.progress.step == 0
    assert not (tmp_path / "run" / "checkpoint").exists(), "a later resume must not find the old run"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"] == "other"


def test_a_gradient_that_is_not_finite_changes_nothing_and_names_the_checkpoint(tmp_path: Path) -> None:
    run, kept = tiny_run(tmp_path / "run"), {}

    def train_until_broken() -> None:
        for step in run.steps():
            if step == 2:
                run.save()
                kept.update({k: v.clone() for k, v in run.unwrapped("net").state_dict().items()})
            # sqrt at 0: the loss is 0, its gradient infinity times 0
            run.update((run.modules["net"](torch.ones(1, 3)) * (step < 2)).abs().sum().sqrt())

    with pytest.raises(NonFiniteLoss, match=r"checkpoint, is intact.*learning rate"):
        train_until_broken()
    assert largest_difference(kept, run.unwrapped("net").state_dict()) == 0.0
    assert log(tmp_path / "run")[-1]["step"] == 2
    assert tiny_run(tmp_path / "run").progress.step == 2


def test_a_checkpoint_of_other_settings_says_what_to_do(tmp_path: Path) -> None:
    fit(tiny_run(tmp_path / "run"), 4)
    with pytest.raises(ConfigError, match="--no-resume"):
        tiny_run(tmp_path / "run", ema_decay=0.9)


def test_the_last_checkpoint_survives_whatever_moment_the_next_is_interrupted(tmp_path: Path) -> None:
    def content() -> str:
        found = find_checkpoint(tmp_path)
        assert found is not None
        return (found / "x").read_text()

    assert find_checkpoint(tmp_path) is None
    (start_checkpoint(tmp_path) / "x").write_text("1")
    publish(tmp_path)
    (start_checkpoint(tmp_path) / "x").write_text("2")
    assert content() == "1"  # killed while writing
    (tmp_path / "checkpoint.new" / "done").touch()
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    assert content() == "2"  # killed between the two renames
    start_checkpoint(tmp_path)
    assert content() == "2"


def test_skipped_samples_are_in_the_log(tmp_path: Path) -> None:
    class Source:
        skipped = {"unreadable pictures": 3}  # noqa: RUF012

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    run = tiny_run(tmp_path / "run")
    run.track("data", Source())
    fit(run, 4)
    assert log(tmp_path / "run")[-1]["skipped"] == {"unreadable pictures": 3}


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"optimizer": "8bit"}, "adamw or fused|low-memory"),
        ({"frozen": "bf16"}, "precision = bf16"),
        ({"accumulate": 0}, "at least 1"),
        ({"lr": -1.0}, "lr is 0 or above"),
        ({"max_grad_norm": 0.0}, "is above 0"),
        ({"ema_decay": 1.0}, "below 1"),
        ({"betas": (0.9, 3.0)}, "below 1"),
    ],
)
def test_settings_that_cannot_work_say_so(tmp_path: Path, values: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        tiny_run(tmp_path / "run", **values)
