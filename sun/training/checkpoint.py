"""Checkpoint folders of a run: the last complete one is there at every moment, also while a new one is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Protocol

import torch

LAST, NEW, OLD = "checkpoint", "checkpoint.new", "checkpoint.old"


class Stateful(Protocol):
    """Something a checkpoint can hold; the state is made of tensors, numbers, texts, lists and dictionaries."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def find_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. Complete ones hold a file ``done``, written last."""
    # NEW before OLD: LAST is missing only between the two renames of `publish`, when NEW is complete.
    return next((folder / name for name in (LAST, NEW, OLD) if (folder / name / "done").exists()), None)


def discard(folder: Path) -> None:
    """Remove the checkpoints and the log of a run that starts anew: a later resume must not find the old one's."""
    for name in (LAST, NEW, OLD):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "log.jsonl").unlink(missing_ok=True)


def start_checkpoint(folder: Path) -> Path:
    """An empty folder to write the next checkpoint into."""
    if not (folder / LAST / "done").exists():  # never throw away the only complete one
        found = find_checkpoint(folder)
        if found is not None:
            shutil.rmtree(folder / LAST, ignore_errors=True)
            found.rename(folder / LAST)
    shutil.rmtree(folder / NEW, ignore_errors=True)
    (folder / NEW).mkdir(parents=True)
    return folder / NEW


def publish(folder: Path) -> None:
    """Make the checkpoint that was written the last one."""
    (folder / NEW / "done").touch()
    shutil.rmtree(folder / OLD, ignore_errors=True)
    if (folder / LAST).exists():
        (folder / LAST).rename(folder / OLD)
    (folder / NEW).rename(folder / LAST)
    shutil.rmtree(folder / OLD, ignore_errors=True)


def save_tracked(folder: Path, process: int, tracked: dict[str, Stateful]) -> None:
    """Write what this process alone knows (position in the data, replayed batches)."""
    torch.save({name: thing.state_dict() for name, thing in tracked.items()}, folder / f"process_{process}.pt")


def load_tracked(folder: Path, process: int) -> dict[str, dict[str, Any]]:
    """What :func:`save_tracked` wrote; a process that was not there before goes on from process 0's state."""
    files = [folder / f"process_{i}.pt" for i in (process, 0)]
    file = next((f for f in files if f.exists()), None)
    return torch.load(file, map_location="cpu", weights_only=True) if file else {}
