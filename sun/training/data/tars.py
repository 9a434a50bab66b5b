"""The samples in a tar file, one after the other, in bounded memory.

A tar file may come from anybody: a few kilobytes, compressed, can say that a picture has three gigabytes. Nothing here
keeps more than one sample and ``MAX_MEMBER`` bytes of it, and nothing but a regular file or an address is opened.
"""

from __future__ import annotations

import bz2
import gzip
import io
import random
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from ...common.reading import ReadError, open_regular, printable
from .samples import DataError, Skipped, is_address, is_command

PICTURES = ("jpg", "jpeg", "png", "webp", "jfif", "bmp", "gif", "tif", "tiff")
TEXTS = ("txt", "json")
MAX_MEMBER = 128 * 2**20
"""Bytes of one sample; a picture of 80 megapixels has about 50 MB."""
_BUFFER, _BUFFER_BYTES = 1000, 512 * 2**20
# Schemes that webdataset opens with a program's arguments, never through a shell; `hf` and the like need its own tools.
_SCHEMES = ("http", "https", "ftps", "sftp", "gs", "ais", "hf", "htgs")
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://[\w.~:/?#\[\]@!$&()*+,;=%-]+", re.ASCII | re.IGNORECASE)


class ShardError(ValueError):
    """A shard, or the rest of it, that cannot be read."""


@dataclass
class RawSample:
    """What a shard holds under one key: contents by lower-case suffix."""

    name: str
    key: str
    parts: dict[str, bytes] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(map(len, self.parts.values()))


def read_samples(url: str, skipped: Skipped) -> Iterator[RawSample]:
    """The samples of a shard; what cannot be read ends it and is counted in ``skipped``."""
    sample: RawSample | None = None
    try:
        for path, content in _members(url):
            key, suffix = _split(path)
            if sample is None or key != sample.key or suffix in sample.parts:
                if sample is not None:
                    yield sample
                sample = RawSample(f"{printable(url)}: {printable(key)}", key)
            if suffix in PICTURES or suffix in TEXTS:
                sample.parts[suffix] = content
            if sample.size > MAX_MEMBER:
                raise ShardError(f"a sample of more than {MAX_MEMBER:,} bytes")
    except (OSError, EOFError, ReadError, ShardError, tarfile.TarError, zlib.error, ValueError) as error:
        skipped.add("unreadable shards or members", f"{printable(url)} ({printable(str(error))})")
    if sample is not None:
        yield sample


def shuffled(samples: Iterator[RawSample], rng: random.Random) -> Iterator[RawSample]:
    """The samples in another order, of which at most 1,000, and half a gigabyte, wait at a time."""
    waiting: list[RawSample] = []
    held = 0
    for sample in samples:
        waiting.append(sample)
        held += sample.size
        while len(waiting) > _BUFFER or (held > _BUFFER_BYTES and len(waiting) > 1):
            place = rng.randrange(len(waiting))
            waiting[place], waiting[-1] = waiting[-1], waiting[place]
            chosen = waiting.pop()
            held -= chosen.size
            yield chosen
    rng.shuffle(waiting)
    yield from waiting


class _Member(tarfile.TarInfo):
    """A header; one that is damaged or missing is an error, where tarfile takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise ShardError(f"damaged or cut off at byte {archive.offset:,}: {error}") from error


def _members(url: str) -> Iterator[tuple[str, bytes]]:
    """(path, content) of every file of a shard that a sample can need; others are passed over with empty content."""
    with _open(url) as stream:
        plain = _Allowance(_unpacked(stream))
        with tarfile.open(fileobj=cast(Any, plain), mode="r|", tarinfo=_Member) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # a stream keeps them all otherwise
                plain.renew()
                name = member.name.rpartition("/")[2]
                if not member.isreg() or (name.startswith("__") and name.endswith("__")):
                    continue
                suffix = _split(member.name)[1]
                if not suffix:
                    continue
                if suffix not in PICTURES and suffix not in TEXTS:
                    yield member.name, b""
                    continue
                if member.size > MAX_MEMBER:
                    raise ShardError(f"{name} has {member.size:,} bytes; at most {MAX_MEMBER:,} are read")
                handle = tar.extractfile(member)
                yield member.name, handle.read() if handle else b""


def _split(path: str) -> tuple[str, str]:
    """(key, lower-case suffix): up to the first dot of the file's name, and what follows. No suffix, no key."""
    folder, slash, name = path.rpartition("/")
    stem, dot, suffix = name.partition(".")
    return (folder + slash + stem, suffix.lower()) if dot and stem else ("", "")


class _Allowance(io.RawIOBase):
    """Passes a stream on until it has given twice ``MAX_MEMBER`` bytes since :meth:`renew`, that is, for one member.

    What a header says of itself is read whole by :mod:`tarfile`, however long it says it is.
    """

    def __init__(self, stream: BinaryIO):
        self.stream, self.left = stream, 2 * MAX_MEMBER

    def renew(self) -> None:
        self.left = 2 * MAX_MEMBER

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        content = self.stream.read(size)
        self.left -= len(content)
        if self.left < 0:
            raise ShardError(f"more than {2 * MAX_MEMBER:,} bytes in one member")
        return content


def _unpacked(stream: BinaryIO) -> BinaryIO:
    """``stream``, or what it holds when it is compressed with gzip or bzip2."""
    buffered = io.BufferedReader(cast(Any, stream)) if not hasattr(stream, "peek") else stream
    head = cast(Any, buffered).peek(6)[:6]
    if head.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=buffered))
    if head.startswith(b"BZh"):
        return cast(BinaryIO, bz2.BZ2File(buffered))
    if head.startswith(b"\xfd7zXZ\x00"):
        raise ShardError("it is compressed with xz; unpack it, shards are plain tar files")
    return buffered


@contextmanager
def _open(url: str) -> Iterator[BinaryIO]:
    if not is_address(url):
        with open_regular(url) as file:
            yield file
        return
    if not is_command(url):
        check_address(url)
    from webdataset.gopen import gopen

    stream = gopen(url)
    try:
        yield _Readable(stream)  # type: ignore[misc]
    finally:
        stream.close()


class _Readable(io.RawIOBase):
    """A pipe of webdataset's as a stream of the standard library."""

    def __init__(self, stream: Any):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self.stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def check_address(url: str) -> None:
    """Raise DataError for an address that is none, or that another program could take for more than one."""
    match = _ADDRESS.fullmatch(url)
    if match is None or match[1].lower() not in _SCHEMES:
        raise DataError(
            f"{printable(url)[:120]} is not an address of a shard: give a file, or one that begins with "
            f"{', '.join(f'{scheme}:' for scheme in _SCHEMES[:6])}, without spaces and quotes."
        )
