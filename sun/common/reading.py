"""What somebody else made, read within bounds: regular files of a limited size, as text, JSON or TOML.

A name can lead to a pipe that never ends, a device that never stops, or a file larger than the memory; a text can be in
any encoding; JSON can be nested until the interpreter gives up, and hold NaN, infinity and numbers of a million digits.
Everything here either returns plain finite values or raises :class:`ReadError` with a sentence.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import stat
from typing import Any, BinaryIO

MAX_TEXT = 16 * 2**20
"""Bytes of a settings file, a table or a model's description: the largest of a real one is below 1 MB."""
MAX_DEPTH = 64
_MAX_DIGITS = 25  # a number of 64 bits has 20

# Longest mark first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# C0 and C1 controls, lone surrogates, line and paragraph separators, and what reorders or hides text.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


class ReadError(ValueError):
    """A file or text that cannot be used; the message says which, why and what to do."""


def open_regular(path: str | os.PathLike[str], most: int | None = None) -> BinaryIO:
    """``path`` opened for reading. Raises ReadError unless it is a regular file of at most ``most`` bytes; OSError."""
    try:
        _check_regular(path, os.stat(path), most)  # before it is opened: opening alone can wait or set something off
        # O_NONBLOCK: whoever puts a pipe there in between does not make us wait.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        handle = os.fdopen(os.open(path, flags), "rb")
    except ValueError as error:
        if isinstance(error, ReadError):
            raise
        raise ReadError(f"{printable(str(path))} is no file name ({error}). Check the path.") from error
    try:
        _check_regular(path, os.fstat(handle.fileno()), most)
    except BaseException:
        handle.close()
        raise
    return handle


def check_regular(path: str | os.PathLike[str], most: int | None = None) -> None:
    """As :func:`open_regular`, for libraries that want to open the file themselves."""
    open_regular(path, most).close()


def read_bytes(path: str | os.PathLike[str], most: int = MAX_TEXT) -> bytes:
    """The content of a regular file of at most ``most`` bytes. Raises ReadError, OSError."""
    with open_regular(path, most) as handle:
        content = handle.read(most + 1) or b""  # what grows while it is read, or states no size
    if len(content) > most:
        raise ReadError(f"{printable(str(path))} is longer than the {most:,} bytes that are read of such a file.")
    return content


def read_text(path: str | os.PathLike[str], most: int = MAX_TEXT) -> str:
    """The text of a file: UTF-8, or what its byte order mark says. Raises ReadError, OSError."""
    return decode_text(read_bytes(path, most), str(path))


def read_json(path: str | os.PathLike[str], most: int = MAX_TEXT, infinite: bool = False) -> Any:
    """The content of a JSON file: see :func:`parse_json`. Raises ReadError, OSError."""
    return parse_json(read_text(path, most), str(path), infinite)


def parse_json(text: str | bytes, where: str, infinite: bool = False) -> Any:
    """JSON with nothing but finite numbers of usual size, at most 64 levels deep. Raises ReadError naming ``where``.

    infinite: also take the word Infinity, which diffusers writes for bounds of a scheduler that are none.
    """
    where = printable(where)
    if isinstance(text, bytes):
        text = decode_text(text, where)
    try:
        constant = _not_nan if infinite else finite
        content = json.loads(text, parse_constant=constant, parse_float=finite, parse_int=_whole)
    except RecursionError:
        raise ReadError(f"{where} is nested too deeply.") from None
    except ValueError as error:
        raise ReadError(f"{where} is not valid JSON: {printable(str(error))}.") from error
    return checked(content, where)


def decode_text(content: bytes, where: str) -> str:
    """``content`` as text without its byte order mark. Raises ReadError naming ``where`` if it is in no encoding."""
    mark, encoding = next(((m, e) for m, e in _MARKS if content.startswith(m)), (b"", "utf-8"))
    try:
        return content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise ReadError(
            f"{printable(where)} is not text in UTF-8 (byte {error.start + len(mark)}). Save it as UTF-8."
        ) from error


def printable(text: str, lines: bool = False) -> str:
    r"""``text`` with everything a terminal would act on written out, as ``\x1b``; ``lines`` keeps line ends."""
    text = _CONTROLS.sub(_written_out, text)
    return text if lines else text.replace("\n", "\\n").replace("\t", "\\t")


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _check_regular(path: str | os.PathLike[str], status: os.stat_result, most: int | None) -> None:
    name = printable(str(path))
    if stat.S_ISDIR(status.st_mode):
        raise ReadError(f"{name} is a folder. Give the file inside it.")
    if not stat.S_ISREG(status.st_mode):
        raise ReadError(f"{name} is not a regular file. Give the file itself.")
    if most is not None and status.st_size > most:
        raise ReadError(f"{name} has {status.st_size:,} bytes, and at most {most:,} are read of such a file.")


def finite(text: str) -> float:
    """The number a JSON or TOML file spells, for parsers that would take NaN and infinity. Raises ValueError."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _not_nan(text: str) -> float:
    number = float(text)
    return number if math.isinf(number) else finite(text)


def _whole(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def checked(content: Any, where: str) -> Any:
    """``content`` if it is of bounded depth and its whole numbers of usual size (TOML's are only known afterwards)."""
    level = [content]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, int) and value.bit_length() > 80:
                raise ReadError(f"{where} holds a number of {value.bit_length()} bits.")
        level = inner
        if not level:
            return content
    raise ReadError(f"{where} is nested more than {MAX_DEPTH} levels deep.")
