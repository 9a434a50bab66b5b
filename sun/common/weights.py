"""Files of weights: what kind a file is, and the header of a safetensors file, without its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import safe_open

from .errors import SunFileError
from .reading import ReadError, open_regular, printable

ADAPTER = "a SUN adapter"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Number formats that our own files are written in."""


class Header(NamedTuple):
    """What a safetensors file says of itself: its tensors without their values (on torch's meta device)."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def header_of(path: str | os.PathLike[str], what: str = ADAPTER) -> Header:
    """The header of any safetensors file. Raises SunFileError for other files and damaged ones.

    what: is wanted, for the message.
    """
    path = Path(path)
    if kind_of(path, what) == "pickle":
        raise SunFileError(
            f"{name_of(path)} is a pickle, not a safetensors file. Pickles can run code; convert it first."
        )
    try:
        # "np": nothing is made of the file but its header; "pt" would reserve memory for all of it
        with safe_open(str(path), framework="np") as content:
            slices = {key: content.get_slice(key) for key in content.keys()}  # noqa: SIM118 (not a dict)
            tensors = {
                key: torch.empty(part.get_shape(), dtype=_STORED.get(part.get_dtype(), torch.uint8), device="meta")
                for key, part in slices.items()
            }
            return Header(tensors, content.metadata() or {})
    except Exception as error:  # a damaged header makes it raise anything
        raise _damaged(path, error) from error


_STORED = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def kind_of(path: Path, what: str = ADAPTER) -> Literal["safetensors", "pickle"]:
    """What a regular file is by its first bytes. Raises SunFileError for what is neither."""
    name = name_of(path)
    try:
        with open_regular(path) as file:
            head = file.read(64)
    except ReadError as error:
        raise SunFileError(str(error)) from error
    except FileNotFoundError:
        raise SunFileError(f"{name} does not exist. Check the path.") from None
    except OSError as error:
        raise SunFileError(f"{name} cannot be read: {error.strerror or error}.") from error
    if not head:
        raise SunFileError(f"{name} is empty. Get it again.")
    if head.startswith(b"version https://git-lfs"):
        raise SunFileError(f"{name} is a Git LFS pointer, not the file itself. Run `git lfs pull`.")
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) and head[8:9] != b"{":
        return "pickle"
    if head[8:9] != b"{" or int.from_bytes(head[:8], "little") > 100_000_000:
        raise SunFileError(f"{name} is not a safetensors file. Choose {what} (.safetensors).")
    return "safetensors"


def values_of(path: Path, header: Header) -> dict[str, torch.Tensor]:
    """The tensors of a file whose header was found right. Raises SunFileError for a damaged file."""
    try:
        with safe_open(str(path), framework="pt") as tensors:
            # clone: what safetensors returns is mapped from the file, which may be replaced later
            return {key: tensors.get_tensor(key).clone() for key in header.tensors}
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> SunFileError:
    size = path.stat().st_size if path.is_file() else 0
    with open_regular(path) as file:
        header = int.from_bytes(file.read(8), "little")
    truncated = size < 8 + header or "incomplete" in str(error).lower()
    state, reason = ("truncated", "") if truncated else ("damaged", f": {short(str(error))}")
    return SunFileError(
        f"{name_of(path)} is a {state} safetensors file ({size:,} bytes{reason}). Download or copy it again."
    )


def clip(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


def short(text: str, limit: int = 80) -> str:
    return repr(clip(text, limit))


def name_of(path: Path) -> str:
    return printable(str(path))
