"""What makes a thing the same thing: a file, a folder, settings.

``stamp`` costs nothing and notices every ordinary change; ``fingerprint`` reads at most some megabytes of a large file;
``sha256_of`` reads all of it and is what others compare with; ``digest_of`` is for values.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .reading import ReadError, open_regular, printable

Stamp = tuple[str, int, int]

_WHOLE_FILE = 256 * 2**20
_END = 2**24
_BLOCK = 2**20
MAX_ENTRIES = 100_000
"""Of a folder with more entries nobody says that it is one model."""


def stamp(path: str | os.PathLike[str]) -> Stamp:
    """Changes when the file does, without reading it: where it is, when it was written, its size. Raises OSError."""
    status = os.stat(path)
    return str(Path(path).resolve()), status.st_mtime_ns, status.st_size


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a whole regular file, in hexadecimal digits. Raises ReadError, OSError."""
    digest = hashlib.sha256()
    with open_regular(path) as handle:
        for block in _blocks(handle):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, or of a folder's files; of a large file its size, head and tail, to stay quick.

    Raises ReadError for what is neither, and for a folder of more than MAX_ENTRIES entries; OSError.
    """
    path = Path(path)
    digest = hashlib.sha256()
    for file in _files_below(path) if path.is_dir() else [path]:
        with open_regular(file) as handle:
            size = os.fstat(handle.fileno()).st_size
            if path.is_dir():
                digest.update(f"{file.relative_to(path).as_posix()}\0{size}\0".encode())
            if size <= _WHOLE_FILE:
                for block in _blocks(handle):
                    digest.update(block)
            else:
                digest.update(str(size).encode() + handle.read(_END))
                handle.seek(-_END, os.SEEK_END)
                digest.update(handle.read())
    return digest.hexdigest()


def digest_of(content: Any, digits: int = 16) -> str:
    """The first ``digits`` hexadecimal digits of the SHA-256 of a value, by its JSON; what has none, by its text."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def _files_below(folder: Path) -> list[Path]:
    found: list[Path] = []
    for number, path in enumerate(folder.rglob("*")):
        if number >= MAX_ENTRIES:
            raise ReadError(
                f"{printable(str(folder))} holds more than {MAX_ENTRIES:,} files. Give the folder of one model."
            )
        if path.is_file():
            found.append(path)
    return sorted(found)


def _blocks(handle: BinaryIO) -> Iterator[bytes]:
    while block := handle.read(_BLOCK):
        yield block
