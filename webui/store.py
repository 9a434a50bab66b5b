"""Loaded adapters: one read of each file, one copy of it on the device of the run."""

from __future__ import annotations

import copy
import functools
import hashlib
from pathlib import Path

import torch

from ..sun.adapter import SunAdapter

Key = tuple[str, int, int]


def key_of(path: Path) -> Key:
    """Changes when the file does, without reading it."""
    stat = path.stat()
    return str(path.resolve()), stat.st_mtime_ns, stat.st_size


def load(path: Path) -> SunAdapter:
    """The adapter of a file, on the CPU with the file's dtypes. Raises SunFileError."""
    return _load(key_of(path))


def short_hash(path: Path) -> str:
    """First ten digits of the file's SHA-256, as the host writes its model hashes."""
    return _short_hash(key_of(path))


def on(adapter: SunAdapter, device: torch.device, dtype: torch.dtype) -> SunAdapter:
    """A copy of `adapter` there; the last one is kept. The original stays as read, so that a run in half precision
    does not change the next one in single."""
    global _copy
    wanted = (id(adapter), device, dtype)
    if _copy is None or _copy[0] != wanted:
        # Forge samples in inference mode; what is made there could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            _copy = (wanted, adapter, copy.deepcopy(adapter).to(device=device, dtype=dtype).requires_grad_(False))
    return _copy[2]


def forget_copy() -> None:
    """Gives the device's memory back."""
    global _copy
    _copy = None


_copy: tuple[tuple[int, torch.device, torch.dtype], SunAdapter, SunAdapter] | None = None


@functools.lru_cache(maxsize=2)
def _load(key: Key) -> SunAdapter:
    return SunAdapter.load(key[0]).requires_grad_(False)


@functools.lru_cache(maxsize=64)
def _short_hash(key: Key) -> str:
    digest = hashlib.sha256()
    with open(key[0], "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:10]
