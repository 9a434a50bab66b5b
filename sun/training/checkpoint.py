"""Checkpoint folders of a run: the last complete one is there at every moment, also while a new one is written.

A checkpoint is a folder of safetensors files: ``state`` with what all processes share, ``process_N`` with what process
N alone knows. Nothing in them can run code. The file ``done``, written last, lists them with their sizes and hashes,
so that a damaged checkpoint is found before anything of it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

LAST, NEW, OLD = "checkpoint", "checkpoint.new", "checkpoint.old"
DONE = "done"
FORMAT = "sun-checkpoint-1"
_STRUCTURE = "structure"
_FILE = re.compile(r"(state|process_\d{1,6})\.safetensors")
_MAX_MANIFEST = 1_000_000


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which and why."""


class Stateful(Protocol):
    """Something a checkpoint can hold; the state is made of tensors, numbers, texts, lists and dictionaries."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


# --- folders ---------------------------------------------------------------------------------------------------------


def find_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. Complete ones hold a file ``done``, written last."""
    # NEW before OLD: LAST is missing only between the two renames of `publish`, when NEW is complete.
    return next((folder / name for name in (LAST, NEW, OLD) if (folder / name / DONE).is_file()), None)


def find_to_resume(folder: Path) -> Path | None:
    """:func:`find_checkpoint`; raises CheckpointError where only one without ``done`` is there, which is damaged."""
    found = find_checkpoint(folder)
    if found is None and (folder / LAST).is_dir():
        raise CheckpointError(
            f"{folder / LAST} is damaged: its file {DONE!r} is missing, which is written last. Bring it back, or start "
            "anew with --no-resume."
        )
    return found


def discard(folder: Path) -> None:
    """Remove the checkpoints and the log of a run that starts anew: a later resume must not find the old one's."""
    for name in (LAST, NEW, OLD):
        _remove(folder / name)
    (folder / "log.jsonl").unlink(missing_ok=True)


def start_checkpoint(folder: Path) -> Path:
    """An empty folder to write the next checkpoint into."""
    if not (folder / LAST / DONE).exists():  # never throw away the only complete one
        found = find_checkpoint(folder)
        if found is not None:
            _remove(folder / LAST)
            found.rename(folder / LAST)
    _remove(folder / NEW)
    (folder / NEW).mkdir(parents=True)
    return folder / NEW


def publish(folder: Path) -> None:
    """Make the checkpoint that was written the last one."""
    new = folder / NEW
    files = {file.name: _fingerprint(file) for file in sorted(new.iterdir()) if _FILE.fullmatch(file.name)}
    unfinished = new / f"{DONE}.part"
    unfinished.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n", encoding="utf-8")
    unfinished.rename(new / DONE)
    _remove(folder / OLD)
    if (folder / LAST).exists():
        (folder / LAST).rename(folder / OLD)
    new.rename(folder / LAST)
    _remove(folder / OLD)


def drop_unfinished(folder: Path) -> None:
    """Remove a checkpoint that could not be written to its end, which frees the room it took."""
    if not (folder / NEW / DONE).exists():
        _remove(folder / NEW)


def check_run_folder(folder: Path, others: tuple[str, ...] = ()) -> None:
    """Raise CheckpointError unless everything a run writes into ``folder`` is a plain file or folder of its own.

    A run that follows a link writes somewhere else, and one that opens a pipe waits for ever. ``others`` are the names
    of further files.
    """
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Give another output folder, or remove it.")
    folders = [folder / name for name in (LAST, NEW, OLD, "samples")]
    files = [folder / name for name in ("config.json", "log.jsonl", *others)]
    files += [file for place in folders if place.is_dir() and not place.is_symlink() for file in place.iterdir()]
    for path in [*folders, *files]:
        right = path.is_dir() if path in folders else path.is_file()
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link to somewhere else; a run reads and writes its own folder alone. Remove it."
            )
        if path.exists() and not right:
            wanted = "folder" if path in folders else "regular file"
            raise CheckpointError(f"{path} is not a {wanted}, as it is in the folder of a run. Remove it.")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# --- reading and writing ---------------------------------------------------------------------------------------------


def verify(checkpoint: Path) -> list[str]:
    """The names of a checkpoint's files, after comparing them with what ``done`` says of them.

    Raises CheckpointError for one that is missing, changed or no regular file, and for a ``done`` that says nothing.
    """
    manifest = _read_manifest(checkpoint / DONE)
    for name, (size, digest) in manifest.items():
        file = checkpoint / name
        if not file.is_file() or file.is_symlink():
            raise CheckpointError(f"{file} is missing or no regular file.")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} has {file.stat().st_size:,} bytes where {size:,} were written.")
        if _fingerprint(file) != [size, digest]:
            raise CheckpointError(f"{file} has changed since it was written.")
    return list(manifest)


def _read_manifest(done: Path) -> dict[str, tuple[int, str]]:
    if done.stat().st_size > _MAX_MANIFEST:
        raise CheckpointError(f"{done} is too large to be the list of a checkpoint's files.")
    text = done.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise CheckpointError(
            f"{done} is empty. Checkpoints of earlier versions look like this: they hold pickles, which can run code, "
            "and are not read any more."
        )
    try:
        content = json.loads(text)
        files = {name: (int(size), str(digest)) for name, (size, digest) in content["files"].items()}
        known = content["format"] == FORMAT and "state.safetensors" in files and all(map(_FILE.fullmatch, files))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        known = False
    if not known:
        raise CheckpointError(f"{done} is not the list of a checkpoint's files.")
    return files


def _fingerprint(file: Path) -> list[Any]:
    with file.open("rb") as handle:
        return [file.stat().st_size, hashlib.file_digest(handle, "blake2b").hexdigest()]


def write_state(file: Path, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers, texts, lists and dictionaries, nested, as one safetensors file.

    Raises CheckpointError for NaN and infinity, OSError when the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_pack(state, tensors, ""), allow_nan=False).encode()
    tensors[_STRUCTURE] = torch.frombuffer(bytearray(structure), dtype=torch.uint8)
    try:
        save_file(tensors, file)
    except Exception as error:  # safetensors has its own class for a full disk
        raise OSError(f"{file} could not be written: {error}") from error


def read_state(file: Path) -> dict[str, Any]:
    """What :func:`write_state` wrote; tensors are read one by one into memory of their own.

    Raises CheckpointError for a file that is damaged or holds NaN or infinity.
    """
    try:
        with safe_open(str(file), "pt") as handle:
            structure = json.loads(handle.get_tensor(_STRUCTURE).numpy().tobytes())
            state = _unpack(structure, lambda name: handle.get_tensor(name).clone())
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except Exception as error:  # a damaged header makes safetensors raise anything
        raise CheckpointError(f"{file} is damaged ({type(error).__name__}: {str(error)[:120]}).") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds a {type(state).__name__} where a state belongs.")
    return state


def _pack(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """``value`` as JSON, its tensors under numbers in ``tensors``; dictionaries are lists of pairs."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = _finite(value.detach().cpu().contiguous(), where)
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, _pack(item, tensors, f"{where}.{key}")] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, tensors, where) for item in value]}
    if isinstance(value, list):
        return [_pack(item, tensors, where) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"{where.lstrip('.')} is {value}")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__} ({where})")


def _unpack(value: Any, tensor: Any, where: str = "") -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensor, where) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return _finite(tensor(content), where)
    if kind == "tuple":
        return tuple(_unpack(item, tensor, where) for item in content)
    if kind == "dict":
        return {key: _unpack(item, tensor, f"{where}.{key}") for key, item in content}
    raise ValueError(f"unknown part {kind!r}")


def _finite(value: Tensor, where: str) -> Tensor:
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise CheckpointError(f"{where.lstrip('.') or 'a tensor'} holds NaN or infinity")
    return value


def save_tracked(folder: Path, process: int, tracked: Mapping[str, Stateful]) -> None:
    """Write what this process alone knows (position in the data, replayed batches)."""
    write_state(folder / f"process_{process}.safetensors", {n: thing.state_dict() for n, thing in tracked.items()})


def load_tracked(folder: Path, process: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """What :func:`save_tracked` wrote; a process that was not there before goes on from process 0's state."""
    wanted = [name for i in (process, 0) if (name := f"process_{i}.safetensors") in names]
    return read_state(folder / wanted[0]) if wanted else {}


def restore(things: Mapping[str, Stateful], states: Mapping[str, Any], checkpoint: Path) -> None:
    """Give every thing its state. Raises CheckpointError for one that does not fit, naming it."""
    for name, thing in things.items():
        if name not in states:
            continue
        try:
            thing.load_state_dict(states[name])
        except Exception as error:  # the state is somebody's data: anything may be wrong with it
            raise CheckpointError(
                f"{checkpoint} cannot be resumed: its state of {name!r} does not fit ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}). Give another output folder, or start anew with --no-resume."
            ) from error


def settings_changed(before: Any, now: Mapping[str, Any], free: tuple[str, ...]) -> Iterator[str]:
    """What differs between the settings of a checkpoint and those of today, but for the names in ``free``."""
    if not isinstance(before, Mapping):
        yield "the checkpoint has no settings"
        return
    for name, value in now.items():
        if name in before and name not in free and before[name] != value:
            yield f"{name} {before[name]!r}, now {value!r}"
