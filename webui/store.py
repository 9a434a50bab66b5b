"""Adapters: what their files say of themselves, one read of each, one copy of it on the device of the run."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path

import torch

from ..sun import files
from ..sun.adapter import SunAdapter
from ..sun.common.errors import NotAnAdapterError
from ..sun.common.identity import Stamp, sha256_of, stamp
from ..sun.files import AdapterTensors, SunFileError


def facts(path: Path) -> AdapterTensors | None:
    """What a file says of itself (tensors without their values), or None if it is no SUN adapter.

    Of a .safetensors file the head alone is read.
    """
    try:
        found = _facts(stamp(path))
    except OSError:
        return None
    return found if isinstance(found, AdapterTensors) else None


def is_another_model(path: Path) -> bool:
    """Whether a file can be read and is something else (a LoRA, say). A damaged one may well be an adapter."""
    try:
        return _facts(stamp(path)) is False
    except OSError:
        return False


def load(path: Path) -> SunAdapter:
    """The adapter of a file, on the CPU with the file's dtypes. Raises SunFileError."""
    return _load(stamp(path))


def short_hash(path: Path) -> str:
    """First ten digits of the file's SHA-256, as the host writes its model hashes."""
    return _short_hash(stamp(path))


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


MAX_PICKLE = 2**30
"""Bytes of a pickle that is read to see what it is; adapters have 40 to 150 MB."""


@functools.lru_cache(maxsize=1024)
def _facts(file: Stamp) -> AdapterTensors | bool | None:
    """Facts of an adapter, False for another model, None for what cannot be read."""
    path = Path(file[0])
    if path.suffix.lower() != ".safetensors" and file[2] > MAX_PICKLE:
        return False
    try:
        content = files.peek(path)
    except NotAnAdapterError:
        return False
    except SunFileError:
        return None
    # A pickle was read whole; of its values nothing is kept.
    layers = tuple({part: value.to("meta") for part, value in layer.items()} for layer in content.layers)
    return replace(content, layers=layers)


@functools.lru_cache(maxsize=2)
def _load(file: Stamp) -> SunAdapter:
    return SunAdapter.load(file[0]).requires_grad_(False)


@functools.lru_cache(maxsize=64)
def _short_hash(file: Stamp) -> str:
    return sha256_of(file[0])[:10]
