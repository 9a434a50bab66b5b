"""Results that are computed once: in parts, on several processes, kept in files named after all they depend on.

A cell is a table of tensors with a row a picture. Its parts are saved as they are made, so that an interrupted
evaluation loses one batch at most, whatever number of processes goes on with it. Several machines must share the
folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from ..common.atomic import file_name, write_atomically
from ..common.devices import process_state
from ..common.identity import digest_of

Tensors = dict[str, Tensor]


def processes() -> PartialState:
    """This process among those that ``accelerate launch`` started. They may wait long for one that measures time."""
    return process_state(timeout=timedelta(hours=24))


def digest(content: Any) -> str:
    """A short name for anything JSON can hold."""
    return digest_of(content, 16)


def fingerprint_module(module: torch.nn.Module) -> str:
    """SHA-256 of a module's weights and their names."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        hashed.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


class CellStore:
    """Cells in ``folder``, or in memory alone without one. ``resume=False`` computes everything anew."""

    def __init__(self, folder: Path | None, resume: bool = True):
        self.folder, self.resume = folder, resume
        self.computed = 0  # parts made by this process in this run, for tests and the curious
        self._memory: dict[str, Tensors] = {}

    def get(
        self, label: str, key: Mapping[str, Any], count: int, size: int, compute: Callable[[slice], Tensors]
    ) -> Tensors:
        """The cell ``label`` with ``count`` rows, made by ``compute`` in batches of ``size`` unless it is there.

        ``key`` is all the result depends on. Every process must ask for the same cells in the same order; the parts
        are divided between them, and each gets the whole.
        """
        name = f"{file_name(label)}-{digest(key)}"
        if name not in self._memory:
            whole = self._read(f"{name}.safetensors")
            self._memory[name] = self._make(label, name, count, size, compute) if whole is None else whole
        return self._memory[name]

    def _make(self, label: str, name: str, count: int, size: int, compute: Callable[[slice], Tensors]) -> Tensors:
        state = processes()
        ranges = [(begin, min(begin + size, count)) for begin in range(0, count, size)]
        mine = ranges[state.process_index :: state.num_processes]
        parts = [
            (begin, self._part(f"{name}.{begin}-{end}", slice(begin, end), compute))
            for begin, end in tqdm(mine, desc=label, leave=False, disable=not state.is_main_process)
        ]
        gathered = [tensors for _, tensors in sorted(gather_object(parts), key=lambda part: part[0])]
        whole = {column: torch.cat([part[column] for part in gathered]) for column in gathered[0]}
        if self.folder and state.is_main_process:
            self._write(f"{name}.safetensors", whole)
            for begin, end in ranges:
                (self.folder / f"{name}.{begin}-{end}.part").unlink(missing_ok=True)
        state.wait_for_everyone()
        return whole

    def _part(self, name: str, rows: slice, compute: Callable[[slice], Tensors]) -> Tensors:
        found = self._read(f"{name}.part")
        if found is not None:
            return found
        made = {column: tensor.detach().cpu().contiguous() for column, tensor in compute(rows).items()}
        self.computed += 1
        self._write(f"{name}.part", made)
        return made

    def _read(self, file: str) -> Tensors | None:
        if self.folder is None or not self.resume or not (self.folder / file).is_file():
            return None
        try:
            return load_file(self.folder / file)
        except SafetensorError:
            return None  # a damaged file is made again

    def _write(self, file: str, tensors: Tensors) -> None:
        if self.folder:
            write_atomically(self.folder / file, lambda handle: handle.write(save(tensors)))

    def note(self, label: str, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """A JSON value made by the main process alone and kept the same way; the others get it too."""
        path = self.folder / f"{file_name(label)}-{digest(key)}.json" if self.folder else None
        state = processes()
        values: Sequence[Any] = []
        if state.is_main_process:
            if path and self.resume and path.is_file():
                value = json.loads(path.read_text())
            else:
                value = make()
                if path:
                    text = json.dumps(value, indent=2)
                    write_atomically(path, lambda handle: handle.write(text.encode()))
            values = [value]
        return gather_object(list(values))[0]
