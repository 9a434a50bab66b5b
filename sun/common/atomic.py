"""Files written in one piece: a reader, a crash or a full disk never meets half of one."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object], durable: bool = False) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then rename it. Returns ``path``.

    durable: wait before the renaming until the content is on the disk, for what a power failure must not empty.

    Raises OSError that names ``path``; what was there before stays then.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        if path.is_dir():  # renaming would say so, but only after everything is written
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, handle = _open_beside(path)
        with handle:
            write(handle)
            if durable:
                handle.flush()
                os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        _remove(temporary)
        raise
    return path


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` as UTF-8 in one piece. Raises OSError."""
    return write_atomically(path, lambda handle: handle.write(text.encode()))


def write_json(path: str | os.PathLike[str], content: Any, indent: int = 2) -> Path:
    """Write ``content`` as JSON in one piece; what JSON has no form for is written as text. Raises OSError."""
    return write_text(path, json.dumps(content, indent=indent, default=str) + "\n")


def file_name(text: str, longest: int = 120) -> str:
    """``text`` as the name of a file or folder: nothing in it that a file system dislikes or that leads elsewhere."""
    name = "".join(c if c.isalnum() or c in "-." else "_" for c in text[:longest])
    inside = name.strip(".")
    before = len(name) - len(name.lstrip("."))
    return "_" * before + inside + "_" * (len(name) - len(inside) - before) or "_"


def _open_beside(path: Path) -> tuple[Path, IO[bytes]]:
    """A new file in the folder of ``path``, with the mode of any new file (``tempfile`` makes private ones)."""
    while True:
        temporary = path.with_name(f".{path.name[:100]}-{secrets.token_hex(6)}.part")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            return temporary, os.fdopen(os.open(temporary, flags, 0o666), "wb")
        except FileExistsError:
            continue


def _remove(temporary: Path | None) -> None:
    if temporary is not None:
        temporary.unlink(missing_ok=True)
