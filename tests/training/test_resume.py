"""Run folders that are damaged, hostile or in use: each ends in one sentence or a correct resume; none runs code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import nn

from sun.common.settings import ConfigError
from sun.training.checkpoint import NEW, find_checkpoint, publish, read_state, write_state
from sun.training.config import RunConfig
from sun.training.data.samples import check_position
from sun.training.replay import ReplayBuffer
from sun.training.run import LOCK, TrainingRun

Damage = Callable[[Path], object]
SETTINGS = {"guidance_scale": 3.0, "substeps": 2}


class Place:
    """A position in the data, as a source keeps it."""

    def __init__(self) -> None:
        self.calls = 0

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = check_position(state["calls"])


def train(folder: Path, steps: int, settings: dict[str, Any] | None = None, **values: Any) -> TrainingRun:
    """A regression of ``steps`` steps whose data is a function of the step alone; every step is a checkpoint."""
    torch.manual_seed(0)
    config = {"precision": "fp32", "lr": 0.1, "checkpoint_minutes": 0.0, "ema_decay": 0.5, **values}
    run = TrainingRun(
        RunConfig(output=str(folder), steps=steps, **config), {"net": nn.Linear(3, 1)}, settings or SETTINGS
    )
    place = run.track("data", Place())
    for step in run.steps():
        place.calls += 1
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        run.update((run.modules["net"](x) - x.sum(1, keepdim=True)).square().mean())
    return run


def weights(run: TrainingRun) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.parameters]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder, 2)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with other settings."""
    folder = tmp_path_factory.mktemp("other") / "run"
    train(folder, 2, {**SETTINGS, "guidance_scale": 8.0})
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """The weights after four steps without an interruption."""
    return weights(train(tmp_path_factory.mktemp("whole") / "run", 4))


def resume(folder: Path) -> str | list[torch.Tensor]:
    """What the run says, or its weights after four steps."""
    try:
        return weights(train(folder, 4))
    except (ConfigError, OSError) as error:
        return str(error)


STATE, PROCESS = "state.safetensors", "process_0.safetensors"


def cut(name: str, share: float) -> Damage:
    def damage(run: Path) -> None:
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: int(len(content) * share)])

    return damage


def written(name: str, content: bytes) -> Damage:
    return lambda run: (run / name).write_bytes(content)


def removed(name: str) -> Damage:
    def damage(run: Path) -> None:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def replaced(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(run: Path) -> None:
        path = run / name
        if path.exists():
            removed(name)(run)
        make(path)

    return damage


def linked(name: str) -> Damage:
    """The file lies elsewhere and a link to it where it was."""

    def damage(run: Path) -> None:
        path, elsewhere = run / name, run.parent / "elsewhere"
        path.rename(elsewhere) if path.exists() else elsewhere.write_text("mine")
        path.symlink_to(elsewhere)

    return damage


def folder_with(name: str) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / name).write_text("x")

    return make


def state(edit: Callable[[dict[str, Any]], object], name: str = STATE) -> Damage:
    """A checkpoint whose state is another and whose hashes are right: made by somebody who knows the format."""

    def damage(run: Path) -> None:
        content = read_state(run / "checkpoint" / name)
        edit(content)
        (run / "checkpoint").rename(run / NEW)
        (run / NEW / "done").unlink()
        write_state(run / NEW / name, content)
        publish(run)

    return damage


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """As ``state``, below the level of names."""

    def damage(run: Path) -> None:
        content = load_file(run / "checkpoint" / STATE)
        edit(content)
        (run / "checkpoint").rename(run / NEW)
        (run / NEW / "done").unlink()
        save_file(content, run / NEW / STATE)
        publish(run)

    return damage


def manifest(edit: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(run: Path) -> None:
        file = run / "checkpoint" / "done"
        content = json.loads(file.read_text())
        edit(content)
        file.write_text(json.dumps(content))

    return damage


def flip(run: Path) -> None:
    file = run / "checkpoint" / STATE
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def nan_weights(content: dict[str, torch.Tensor]) -> None:
    for name, tensor in content.items():
        if tensor.is_floating_point():
            content[name] = torch.full_like(tensor, float("nan"))


def structure(text: bytes) -> Damage:
    def edit(content: dict[str, torch.Tensor]) -> None:
        content["structure"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    return tensors(edit)


REFUSED: dict[str, tuple[Damage, str]] = {
    "the output is a file": (replaced("", lambda p: p.write_text("x")), "not a folder"),
    "the output is a pipe": (replaced("", os.mkfifo), "not a folder"),
    "the checkpoint is a file": (replaced("checkpoint", lambda p: p.write_text("x")), "not a folder"),
    "the checkpoint is a pipe": (replaced("checkpoint", os.mkfifo), "not a folder"),
    "the checkpoint is a link": (linked("checkpoint"), "link"),
    "the checkpoint is empty": (replaced("checkpoint", Path.mkdir), "'done' is missing"),
    "done is missing": (removed("checkpoint/done"), "'done' is missing"),
    "done is empty, as of earlier versions": (written("checkpoint/done", b""), "pickles"),
    "done is no JSON": (written("checkpoint/done", b"\x80\x04}"), "not the list"),
    "done is deep JSON": (written("checkpoint/done", b"[" * 300_000), "not the list"),
    "done is a list": (written("checkpoint/done", b"[1, 2]"), "not the list"),
    "done is huge": (written("checkpoint/done", b" " * 2_000_000), "too large"),
    "done is a folder": (replaced("checkpoint/done", Path.mkdir), "not a regular file"),
    "done is a pipe": (replaced("checkpoint/done", os.mkfifo), "not a regular file"),
    "done is a link": (linked("checkpoint/done"), "link"),
    "done is of another format": (manifest(lambda m: m.update(format="sun-checkpoint-9")), "not the list"),
    "done names a file elsewhere": (manifest(lambda m: m["files"].update({"../x.json": [1, "x"]})), "not the list"),
    "done has no state": (manifest(lambda m: m["files"].pop(STATE)), "not the list"),
    "done has a wrong size": (manifest(lambda m: m["files"][STATE].__setitem__(0, 7)), "bytes where 7"),
    "the state is cut": (cut(f"checkpoint/{STATE}", 0.5), "bytes where"),
    "the state is empty": (cut(f"checkpoint/{STATE}", 0), "bytes where"),
    "the state is missing": (removed(f"checkpoint/{STATE}"), "missing"),
    "the state is a folder": (replaced(f"checkpoint/{STATE}", Path.mkdir), "not a regular file"),
    "the state is a pipe": (replaced(f"checkpoint/{STATE}", os.mkfifo), "not a regular file"),
    "the state is a link": (linked(f"checkpoint/{STATE}"), "link"),
    "the state has a bit flipped": (flip, "has changed"),
    "the state is no safetensors": (structure(b"\x80\x04"), "is damaged"),
    "the state's structure is no JSON": (structure(b"{"), "is damaged"),
    "the state's structure is deep": (structure(b"[" * 300_000), "is damaged"),
    "the state's structure is a list": (structure(b"[]"), "belongs"),
    "the state names a tensor that is not there": (structure(b'{"dict": [["x", {"tensor": "99"}]]}'), "is damaged"),
    "the state is of another kind": (structure(b'{"pickle": 1}'), "is damaged"),
    "the weights are NaN": (tensors(nan_weights), "NaN"),
    "the weights have another shape": (
        state(lambda s: s["weights"]["net"].update(weight=torch.zeros(1, 7))), "does not fit"),
    "the weights have other names": (state(lambda s: s.update(weights={"net": {"x": torch.zeros(1)}})), "does not fit"),
    "the weights are text": (state(lambda s: s.update(weights="none")), "does not fit"),
    "there are no weights": (state(lambda s: s.pop("weights")), "has no weights"),
    "there is no average": (state(lambda s: s.pop("ema")), "has no ema"),
    "the average has another shape": (
        state(lambda s: s["ema"].update(shadow_params=[torch.zeros(2)])), "does not fit"),
    "the average is of numbers": (state(lambda s: s["ema"].update(shadow_params=[1, 2])), "does not fit"),
    "the optimiser's state has another shape": (
        state(lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(9))), "does not fit"),
    "the optimiser's state is of more weights": (
        state(lambda s: s["optimizer"]["state"].update({7: {}})), "does not fit"),
    "the optimiser's state is a list": (state(lambda s: s.update(optimizer=[1])), "does not fit"),
    "the optimiser has counted below zero": (
        state(lambda s: s["optimizer"]["state"][0].update(step=torch.tensor(-3.0))), "does not fit"),
    "the step is negative": (state(lambda s: s["progress"].update(step=-1)), "does not fit"),
    "the step is a text": (state(lambda s: s["progress"].update(step="2")), "does not fit"),
    "the step is a fraction": (state(lambda s: s["progress"].update(step=1.5)), "does not fit"),
    "the time is negative": (state(lambda s: s["progress"].update(seconds=-1.0)), "does not fit"),
    "the losses are a list": (state(lambda s: s["progress"].update(losses=[1])), "does not fit"),
    "the progress is missing": (state(lambda s: s.pop("progress")), "has no progress"),
    "the settings are missing": (state(lambda s: s.pop("settings")), "no settings"),
    "the settings are others": (state(lambda s: s["settings"].update(substeps=9)), "substeps 9, now 2"),
    "the place in the data is a list": (
        state(lambda s: s["data"].update(calls=[1]), PROCESS), "'data' does not fit"),
    "the place in the data is missing": (state(lambda s: s["data"].clear(), PROCESS), "'data' does not fit"),
    "the process's state is cut": (cut(f"checkpoint/{PROCESS}", 0.5), "bytes where"),
    "the process's state is missing": (removed(f"checkpoint/{PROCESS}"), "missing"),
    "the process's state is a pipe": (replaced(f"checkpoint/{PROCESS}", os.mkfifo), "not a regular file"),
    "the log is a link": (linked("log.jsonl"), "link"),
    "the log is a folder": (replaced("log.jsonl", Path.mkdir), "not a regular file"),
    "the log is a pipe": (replaced("log.jsonl", os.mkfifo), "not a regular file"),
    "the settings' file is a link": (linked("config.json"), "link"),
    "the settings' file is a pipe": (replaced("config.json", os.mkfifo), "not a regular file"),
    "the lock is a link": (linked("run.lock"), "link"),
    "the lock is a folder": (replaced("run.lock", Path.mkdir), "not a regular file"),
    "the samples are a link": (linked("samples"), "link"),
    "the samples are a file": (replaced("samples", lambda p: p.write_text("x")), "not a folder"),
    "a next checkpoint is a file": (replaced("checkpoint.new", lambda p: p.write_text("x")), "not a folder"),
}  # fmt: skip
RESUMED: dict[str, Damage] = {
    "nothing": lambda run: None,
    "the settings' file is damaged": written("config.json", b"{"),
    "the settings' file is missing": lambda run: (run / "config.json").unlink(missing_ok=True),
    "the log is missing": removed("log.jsonl"),
    "the log is cut": cut("log.jsonl", 0.5),
    "the log is no text": written("log.jsonl", b"\xff\xfe\x00"),
    "a next checkpoint is unfinished": replaced("checkpoint.new", folder_with("state.safetensors")),
    "an earlier checkpoint is unfinished": replaced("checkpoint.old", folder_with("x")),
    "killed between the two renames": lambda run: (run / "checkpoint").rename(run / "checkpoint.old"),
    "a pickle lies beside": written("checkpoint/custom_checkpoint_0.pkl", pickle.dumps(print)),
    "a file of unknown purpose": written("checkpoint/x.bin", b"x"),
    "samples": replaced("samples", folder_with("000002.png")),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_damaged_run_folder_is_refused_in_a_sentence(finished: Path, tmp_path: Path, kind: str) -> None:
    damage, match = REFUSED[kind]
    run = shutil.copytree(finished, tmp_path / "run")
    damage(run)
    said = resume(run)
    assert isinstance(said, str)
    assert match in said
    assert said.endswith(".")
    assert str(run) in said


@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_folder_that_lost_nothing_of_the_run_is_resumed(
    finished: Path, whole: list[torch.Tensor], tmp_path: Path, kind: str
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    RESUMED[kind](run)
    resumed = resume(run)
    assert not isinstance(resumed, str), resumed
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))


def test_the_checkpoint_of_another_run_is_refused(finished: Path, other: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoint")
    shutil.copytree(other / "checkpoint", run / "checkpoint")
    assert "guidance_scale 8.0, now 3.0" in str(resume(run))
    run = shutil.copytree(finished, tmp_path / "mixed")
    shutil.copy(other / "checkpoint" / STATE, run / "checkpoint" / STATE)
    assert "--no-resume" in str(resume(run))


def test_a_run_that_is_started_anew_needs_nothing_of_a_damaged_checkpoint(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "checkpoint" / STATE).write_bytes(b"")
    assert train(run, 2, resume=False).progress.step == 2
    (run / "checkpoint" / "done").unlink()
    assert train(run, 2, resume=False).progress.step == 2


def test_a_checkpoint_holds_no_pickle(finished: Path) -> None:
    files = sorted(file.name for file in (finished / "checkpoint").iterdir())
    assert files == ["done", PROCESS, STATE]


def test_a_changed_weight_decay_acts_in_a_resumed_run(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    resumed = train(run, 3, weight_decay=0.25)
    assert [group["weight_decay"] for group in resumed.optimizer.param_groups] == [0.25]


def test_a_run_whose_checkpoint_was_removed_says_that_it_begins_anew(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoint")
    train(run, 1)
    assert "begins anew" in capsys.readouterr().out


# --- two trainings, and no room --------------------------------------------------------------------------------------

PROGRAM = """
import sys, resource
from pathlib import Path
sys.path.insert(0, {tests!r})
import training.test_resume as t
from sun.training.run import LOCK, TrainingRun
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}", "OMP_NUM_THREADS": "1"}
    program = PROGRAM.format(tests=str(tests)) + code
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


def test_a_folder_that_another_holds_is_refused(tmp_path: Path) -> None:
    assert train(tmp_path / "run", 1).progress.step == 1
    with FileLock(tmp_path / "run" / LOCK):
        assert "another training is running" in str(resume(tmp_path / "run"))
    assert "another training" not in str(resume(tmp_path / "run"))


@pytest.mark.slow  # two processes, as people start them
def test_two_trainings_in_one_folder_do_not_run_at_once(tmp_path: Path) -> None:
    run = train(tmp_path / "run", 1)
    second = python("print(t.resume(Path(sys.argv[1])))", str(tmp_path / "run"))
    assert "another training is running" in second.stdout, second.stderr
    assert run.progress.step == 1
    del run
    assert "another training" not in str(resume(tmp_path / "run"))


def test_a_full_disk_leaves_the_last_checkpoint_and_a_sentence(finished: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the system refuses to write on, as it does when full."""
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "checkpoint" / STATE).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.redirect_stdout(io.StringIO()):  # what pytest keeps of the output is a file too
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
        try:
            said = str(resume(run))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be written" in said
    assert "is intact" in said
    assert "run the same command again" in said
    found = find_checkpoint(run)
    assert found is not None
    assert (found / STATE).read_bytes() == before
    assert not (run / NEW).exists()
    assert train(run, 4).progress.step == 4


def test_pictures_that_cannot_be_written_do_not_end_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path / "run", 1)
    with run.writing("samples", needed=False):
        raise OSError(28, "No space left on device")
    assert "samples could not be written" in capsys.readouterr().out
    with pytest.raises(OSError, match=r"adapter could not be written.*is intact"), run.writing("adapter"):
        raise OSError(28, "No space left on device")


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    content = {
        "tensors": {0: torch.arange(3), "half": torch.tensor([1.5], dtype=torch.bfloat16), "none": torch.empty(0)},
        "list": [1, 2.5, "text \u2028 \U0001f600", None, True, (1, 2), {}],
    }
    write_state(tmp_path / "x.safetensors", content)
    again = read_state(tmp_path / "x.safetensors")
    assert again["list"] == content["list"]
    assert again["tensors"].keys() == content["tensors"].keys()
    for name, tensor in content["tensors"].items():
        assert torch.equal(again["tensors"][name], tensor)
        assert again["tensors"][name].dtype == tensor.dtype


def test_rows_of_one_batch_are_kept_apart(tmp_path: Path) -> None:
    batch = torch.randn(4, 5)
    write_state(tmp_path / "x.safetensors", {"rows": list(batch)})
    rows = read_state(tmp_path / "x.safetensors")["rows"]
    assert torch.equal(torch.stack(rows), batch)
    assert len({row.untyped_storage().data_ptr() for row in rows}) == 4  # each goes when it is dropped


def test_a_replayed_batch_whose_parts_do_not_belong_together_is_refused() -> None:
    x, text = torch.zeros(2, 4, 2, 2), torch.zeros(2, 77, 8)
    good = {"x_t": x, "t": torch.zeros(2), "e_step": x, "e_cfg": x, "replaced": torch.zeros(2), "w": torch.empty(0)}
    buffer = ReplayBuffer(2, torch.device("cpu"))
    buffer.load_state_dict({"batches": [{**good, "positive": text, "negative": text}]})
    assert len(buffer) == 1
    for wrong in ({"e_cfg": x[:1]}, {"t": torch.zeros(3)}, {"negative": text[:1]}, {"w": torch.zeros(1)}):
        with pytest.raises(ValueError, match="do not belong together"):
            buffer.load_state_dict({"batches": [{**good, "positive": text, "negative": text, **wrong}]})
