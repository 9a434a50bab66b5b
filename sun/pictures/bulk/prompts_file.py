"""A file of prompts of any length: read once for where its rows are, then by offsets, never as a whole."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import re
import zipfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...common.atomic import write_atomically
from ...common.reading import ReadError, decode_text, open_regular, parse_json, printable
from .rows import COLUMNS, Form, RowError, csv_cells, unknown

KINDS = {".txt": "txt", ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
MAX_ROWS = 10**9
MAX_RECORD = 2**20
"""Bytes of a row; texts of the longest that a recipe takes fit."""
MAX_LINES = 1000
"""Lines of a row of a CSV file, whose quoted texts may hold line ends."""
COMPARED = 2**22
"""Rows that are looked at for repetitions: 32 MiB of their hashes."""
_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BUFFER = 2**20


@dataclass(frozen=True)
class Contents:
    """What reading a file of prompts once has told. ``repeated``: rows that are, byte by byte, an earlier one."""

    sha256: str
    size: int
    rows: int
    blank: int
    repeated: int
    first_repeated: tuple[int, ...]


class PromptsFile:
    """Rows of a file by their number. Raises ReadError, OSError where it says that it reads."""

    def __init__(self, path: Path, form: Form, every: int, contents: Contents, places: np.ndarray, stamp: Any):
        self.path, self.form, self.every, self.contents = path, form, every, contents
        self._places, self._stamp = places, stamp  # places: int64 [n, 2], offset and line of each ``every``-th row

    def __len__(self) -> int:
        return self.contents.rows

    @classmethod
    def read(cls, path: Path, every: int, on_bytes: Callable[[int, int], None] | None = None) -> PromptsFile:
        """Read ``path`` once, remembering the place of each ``every``-th row. ``on_bytes(done, size)`` now and then.

        Raises ReadError for what is no file of prompts, or changes meanwhile, and OSError.
        """
        form = form_of(path)
        with open_regular(path) as handle:
            stamp = _stamp(handle)
            contents, places = _scan(handle, path, form, every, on_bytes)
            if _stamp(handle) != stamp:
                raise ReadError(f"{_name(path)} changed while it was read. Wait until it is written.")
        if not contents.rows:
            raise ReadError(f"{_name(path)} holds no prompts.")
        return cls(path, form, every, contents, places, stamp)

    @classmethod
    def known(cls, path: Path, index: Path, every: int) -> PromptsFile | None:
        """The file as ``index`` knows it, without reading it; None if it is not that file, or if there is no index."""
        try:
            with np.load(index, allow_pickle=False) as kept:
                about = parse_json(str(kept["about"]), str(index))
                places = kept["places"]
            with open_regular(path) as handle:
                stamp = _stamp(handle)
            contents = Contents(**{**about["contents"], "first_repeated": tuple(about["contents"]["first_repeated"])})
            if places.shape != (-(-contents.rows // every), 2) or places.dtype != np.int64:
                return None
            same = about["stamp"] == list(stamp) and about["every"] == every
            return cls(path, form_of(path), every, contents, places, stamp) if same else None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    def keep(self, index: Path) -> None:
        """Write what was found to ``index``, so that the next process need not read the file. Raises OSError."""
        about = {"stamp": list(self._stamp), "every": self.every, "contents": asdict(self.contents)}
        text = json.dumps(about)
        write_atomically(index, lambda handle: np.savez(handle, places=self._places, about=np.array(text)))

    def rows(self, first: int, last: int) -> Iterator[tuple[int, int, bytes]]:
        """(number, line, bytes) of the rows from ``first`` to before ``last``. Raises ReadError if the file changed."""
        if first >= min(last, len(self)):
            return
        offset, begin = (int(value) for value in self._places[first // self.every])
        with open_regular(self.path) as handle:
            if _stamp(handle) != self._stamp:
                raise ReadError(f"{_name(self.path)} changed during the run. Put it back as it was, or begin anew.")
            handle.seek(offset)
            number = first // self.every * self.every
            for _, line, raw in _records(handle, self.path, self.form, offset, begin):
                if number >= first:
                    yield number, line, raw
                number += 1
                if number >= min(last, len(self)):
                    return


def form_of(path: Path) -> Form:
    """How rows are written, by the file's suffix and a CSV file's first line. Raises ReadError, OSError."""
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise ReadError(
            f"{_name(path)}: prompts come as .txt (one a line), .csv (with a line of column names) or .jsonl "
            "(one object a line)."
        )
    with open_regular(path) as handle:
        head = handle.read(MAX_RECORD + 1)
    if head.startswith(_MARKS) or b"\0" in head[:1000]:
        raise ReadError(f"{_name(path)} is not text in UTF-8; it may be UTF-16, or no text. Save it as UTF-8.")
    first = head.removeprefix(codecs.BOM_UTF8).split(b"\n", 1)[0]
    if b"\r" in first.rstrip(b"\r"):
        raise ReadError(f"{_name(path)} has line ends of old Macs (carriage returns alone). Save it with others.")
    return Form(kind) if kind != "csv" else _csv_form(path, head)


def _csv_form(path: Path, head: bytes) -> Form:
    lines = io.BytesIO(head[_mark(head) :])
    first = next((raw for _, _, raw in _records(lines, path, Form("txt"), 0, 1)), b"")
    try:
        text = decode_text(first, "it")
        found = {mark: [cell.strip().lower() for cell in csv_cells(text, mark)] for mark in (",", ";", "\t")}
    except (ReadError, RowError) as error:
        raise ReadError(f"{_name(path)}: its first line cannot be read ({error}).") from error
    delimiter = next(
        (mark for mark, names in found.items() if "prompt" in names), max(found, key=lambda m: len(found[m]))
    )
    names = found[delimiter]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise ReadError(f"{_name(path)} has the column {printable(twice[0])} twice.")
    wrong, _ = unknown(tuple(names))
    if wrong:
        raise ReadError(f"{_name(path)}: {'; '.join(wrong)}. There are: {', '.join(COLUMNS)}.")
    if "prompt" not in names:
        raise ReadError(
            f"{_name(path)} has no column prompt: its first line must name the columns, as in prompt,negative,seed. "
            "A list of prompts without columns is a .txt."
        )
    return Form("csv", delimiter, tuple(names))


def _scan(
    handle: BinaryIO, path: Path, form: Form, every: int, on_bytes: Callable[[int, int], None] | None
) -> tuple[Contents, np.ndarray]:
    size = os.fstat(handle.fileno()).st_size
    hashing = _Hashing(handle, on_bytes, size)
    stream = io.BufferedReader(hashing, _BUFFER)
    begin = _mark(stream.peek(3))
    stream.read(begin)
    places, hashes, rows, lines = array("q"), array("q"), 0, _Lines()
    for offset, line, raw in _records(stream, path, form, begin, 1, lines, header=form.kind == "csv"):
        if rows % every == 0:
            places.extend((offset, line))
        if rows < COMPARED:
            hashes.append(hash(raw.strip()))
        rows += 1
        if rows > MAX_ROWS:
            raise ReadError(f"{_name(path)} has more than {MAX_ROWS:,} rows. Divide it.")
    repeated, first = _repeated(np.frombuffer(hashes, np.int64))
    contents = Contents(hashing.digest.hexdigest(), hashing.total, rows, lines.blank, repeated, first)
    return contents, np.frombuffer(places, np.int64).reshape(-1, 2)


def _repeated(hashes: np.ndarray) -> tuple[int, tuple[int, ...]]:
    """How many rows repeat an earlier one, and the first three that do."""
    order = np.argsort(hashes, kind="stable")
    same = np.zeros(len(hashes), bool)
    same[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
    return int(same.sum()), tuple(int(i) for i in np.flatnonzero(same)[:3])


class _Lines:
    """Lines without a row, counted while records are read."""

    blank = 0


class _Hashing(io.RawIOBase):
    """Passes a file on and hashes it."""

    def __init__(self, handle: BinaryIO, on_bytes: Callable[[int, int], None] | None, size: int):
        self.handle, self.digest, self.total, self.on_bytes, self.size = handle, hashlib.sha256(), 0, on_bytes, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.handle.readinto(buffer)  # type: ignore[attr-defined]
        self.digest.update(memoryview(buffer)[:count])
        self.total += count
        if self.on_bytes:
            self.on_bytes(self.total, self.size)
        return int(count)


def _mark(head: bytes) -> int:
    """Bytes of the byte order mark that a file begins with."""
    return len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0


def _records(
    handle: Any,
    path: Path,
    form: Form,
    offset: int,
    line: int,
    lines: _Lines | None = None,
    header: bool = False,
) -> Iterator[tuple[int, int, bytes]]:
    """(offset, line, bytes) of each row from where ``handle`` stands, which is ``offset`` in line ``line``.

    Blank lines are no rows, and with ``header`` the first row is none.
    """
    complete = _complete(form.delimiter) if form.kind == "csv" else None
    while raw := handle.readline(MAX_RECORD + 1):
        begin, count = line, 1
        if complete and b'"' in raw:
            raw, count = _whole_record(handle, raw, complete, path, line)
        if len(raw) > MAX_RECORD:
            raise ReadError(f"{_name(path)}, line {line}: longer than {MAX_RECORD:,} bytes. Is it a file of prompts?")
        place = offset
        offset += len(raw)
        line += count
        if not raw.strip():
            if lines is not None:
                lines.blank += 1
        elif header:
            header = False
        else:
            yield place, begin, raw


def _whole_record(handle: Any, raw: bytes, complete: re.Pattern[bytes], path: Path, line: int) -> tuple[bytes, int]:
    """A record of a CSV file that begins with ``raw``, and how many lines it has."""
    parts, count, asked = [raw], 1, True
    while True:
        if asked and complete.fullmatch(record := b"".join(parts)):
            return record, count
        more = handle.readline(MAX_RECORD + 1)
        parts.append(more)
        count += 1
        if not more or count > MAX_LINES or sum(map(len, parts[-2:])) > MAX_RECORD:
            raise ReadError(
                f"{_name(path)}, line {line}: a quote is opened and not closed within {MAX_LINES} lines. Close it, or "
                'write quotes inside a text twice, in quotes: "a 5"" disk".'
            )
        asked = b'"' in more


@lru_cache
def _complete(delimiter: str) -> re.Pattern[bytes]:
    """Matches a record all of whose quotes are closed, as the csv module reads them."""
    mark = re.escape(delimiter.encode())
    cell = rb'(?:"(?:[^"]++|"")*+"[^%(d)b\r\n]*+|[^"%(d)b\r\n][^%(d)b\r\n]*+|)' % {b"d": mark}
    return re.compile(cell + rb"(?:" + mark + cell + rb")*+\r*+\n?+")


def _stamp(handle: BinaryIO) -> tuple[int, int]:
    status = os.fstat(handle.fileno())
    return status.st_size, status.st_mtime_ns


def _name(path: Path) -> str:
    return printable(str(path))
