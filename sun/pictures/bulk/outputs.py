"""Where pictures go: a folder of PNGs in subfolders, or tar shards as webdataset reads them.

Rows 12,000 to 12,999 are the PNGs of ``000/012`` or, in shards of 1,000, ``000012.tar``. What
carries its final name is whole; a picture that is there need not be drawn again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from PIL import Image

from ...common.atomic import write_atomically

FOLDER = 1000
"""PNGs in one subfolder."""
_TEMPORARY = re.compile(r"\.(\d{6,9})\.(?:png|tar)-[0-9a-f]{12}\.part")


class Output(Protocol):
    """One block at a time: begin it, write its pictures, finish or leave it."""

    def begin(self, block: int, rows: range, taken_over: bool) -> set[int]:
        """Rows of the block whose pictures are there already."""

    def write(self, row: int, png: bytes, about: str) -> None:
        """Keep a picture and its recipe; may be called from several threads."""

    def finish(self) -> None:
        """Make the block's pictures last. Raises OSError, FileNotFoundError also where somebody else finished it."""

    def leave(self) -> None:
        """Leave the block as it is, for whoever takes it next."""

    def join(self, shard: int) -> None:
        """Put together a shard all of whose blocks are done. Raises OSError."""

    def waiting(self) -> Iterator[int]:
        """Shards that are still to be joined."""

    def tidy(self) -> None:
        """Take away what processes that died left half written, once everything is done."""


def key(row: int) -> str:
    """The name of a picture without its suffix: the same in every run, and in the order of the rows."""
    return f"{row:09d}"


def picture_path(row: int) -> str:
    """Where a picture is in a folder of PNGs."""
    return f"{row // 10**6:03d}/{row // FOLDER % 1000:03d}/{key(row)}.png"


class PictureFolder:
    """A folder of PNGs, a thousand in each subfolder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._written: list[Path] = []
        self._lock = threading.Lock()

    def begin(self, block: int, rows: range, taken_over: bool) -> set[int]:
        self._written = []
        there: set[int] = set()
        for parent in {(self.folder / picture_path(row)).parent for row in (rows[0], rows[-1])}:
            with contextlib.suppress(FileNotFoundError):
                names = os.listdir(parent)
                there |= {int(name[:9]) for name in names if re.fullmatch(r"\d{9}\.png", name)}
                for name in names if taken_over else ():  # of a process that died while it wrote
                    if (match := _TEMPORARY.fullmatch(name)) and int(match[1]) in rows:
                        (parent / name).unlink(missing_ok=True)
        return {row for row in there & set(rows) if is_whole(self.folder / picture_path(row))}

    def write(self, row: int, png: bytes, about: str) -> None:
        path = write_atomically(self.folder / picture_path(row), lambda handle: handle.write(png))
        with self._lock:
            self._written.append(path)

    def finish(self) -> None:
        for path in self._written:
            sync(path)
        self._written = []

    def leave(self) -> None:
        self._written = []

    def join(self, shard: int) -> None:
        pass

    def waiting(self) -> Iterator[int]:
        yield from ()

    def tidy(self) -> None:
        pass  # done block by block


class Shards:
    """Tar files of the same number of rows each, with ``000000123.png`` and ``000000123.json`` for every picture.

    A block's pictures are appended to a file of this process (``.spool``), which a process that dies leaves for the
    next: whole samples are taken from it. When the block is finished the file becomes ``.part``, and when all blocks
    of a shard are, their parts become the shard, in the order of the rows.
    """

    def __init__(self, folder: Path, parts: Path, worker: str, blocks_a_shard: int):
        self.folder, self.parts, self.worker, self.blocks_a_shard = folder, parts, worker, blocks_a_shard
        self._block, self._left_over = -1, list[Path]()
        self._tar: Any = None
        self._lock = threading.Lock()
        parts.mkdir(parents=True, exist_ok=True)

    def begin(self, block: int, rows: range, taken_over: bool) -> set[int]:
        self._block, self._left_over = block, []
        folder = self._folder(block)
        folder.mkdir(parents=True, exist_ok=True)
        there: set[int] = set()
        names = sorted(name for name in os.listdir(folder) if name.startswith(f"{block:09d}."))
        spool = folder / f"{block:09d}.{self.worker}.spool"
        self._tar = _open_tar(spool)
        for name in names:
            if (folder / name) != spool:
                self._left_over.append(folder / name)
                there |= self._adopt(folder / name, set(rows) - there)
        if (shard := self.shard_path(block // self.blocks_a_shard)).exists():
            there |= samples_in(shard).keys() & set(rows)
        return there

    def write(self, row: int, png: bytes, about: str) -> None:
        with self._lock:
            _append(self._tar, f"{key(row)}.json", about.encode())
            _append(self._tar, f"{key(row)}.png", png)  # last: a sample with it is whole
            self._tar.fileobj.flush()

    def finish(self) -> None:
        folder, name = self._folder(self._block), f"{self._block:09d}"
        spool = folder / f"{name}.{self.worker}.spool"
        self._tar.close()
        self._tar.fileobj.close()
        sync(spool)
        os.replace(spool, folder / f"{name}.part")
        for path in self._left_over:
            if path.name != f"{name}.part":
                path.unlink(missing_ok=True)
        if self.blocks_a_shard == 1:
            self.join(self._block)

    def leave(self) -> None:
        if self._tar is not None:
            with contextlib.suppress(OSError):
                self._tar.fileobj.close()

    def join(self, shard: int) -> None:
        """Make a shard of the parts of its blocks, and of the pictures that it has already. Raises OSError."""
        blocks = range(shard * self.blocks_a_shard, (shard + 1) * self.blocks_a_shard)
        parts = [path for block in blocks if (path := self._folder(block) / f"{block:09d}.part").exists()]
        target = self.shard_path(shard)
        if not parts:
            return
        sources = [*([target] if target.exists() else []), *parts]
        try:
            write_atomically(target, lambda handle: _merge(sources, handle), durable=True)
        except FileNotFoundError:
            if not target.exists():  # else somebody joined it meanwhile
                raise
        for path in parts:
            path.unlink(missing_ok=True)

    def waiting(self) -> Iterator[int]:
        found: set[int] = set()
        for shelf in sorted(os.listdir(self.parts)):
            for name in os.listdir(self.parts / shelf):
                if name.endswith(".part") and name[:9].isdigit():
                    found.add(int(name[:9]) // self.blocks_a_shard)
        yield from sorted(found)

    def tidy(self) -> None:
        for name in os.listdir(self.folder):
            if _TEMPORARY.fullmatch(name):
                (self.folder / name).unlink(missing_ok=True)
        for spool in self.parts.glob("*/*.spool"):
            spool.unlink(missing_ok=True)

    def shard_path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.tar"

    def _folder(self, block: int) -> Path:
        return self.parts / f"{block // 1000:06d}"

    def _adopt(self, path: Path, wanted: set[int]) -> set[int]:
        """Copy the whole samples of what another process left to our own file; which rows they are."""
        found = {row: places for row, places in samples_in(path).items() if row in wanted}
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as handle:
            for row, (about, png) in list(found.items()):
                content = _read(handle, png)
                if is_whole(io.BytesIO(content)):
                    self.write(row, content, _read(handle, about).decode())
                else:
                    del found[row]
        return set(found)


Place = tuple[int, int]


def samples_in(path: Path) -> dict[int, tuple[Place, Place]]:
    """(offset, length) of recipe and picture of each row in a tar file, without what is cut off."""
    found: dict[int, tuple[Place, Place]] = {}
    about: dict[int, Place] = {}
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem, _, suffix = member.name.partition(".")
                end = member.offset_data + member.size
                if not stem.isdigit() or end > size:
                    continue
                if suffix == "json":
                    about[int(stem)] = (member.offset_data, member.size)
                elif suffix == "png" and int(stem) in about:
                    found[int(stem)] = (about[int(stem)], (member.offset_data, member.size))
    except (tarfile.TarError, FileNotFoundError, EOFError):
        pass
    return found


def _merge(sources: list[Path], target: IO[bytes]) -> None:
    """One tar file of several, in the order of the rows; of a row in several the last."""
    where: dict[int, tuple[Path, Place, Place]] = {}
    for path in sources:
        if not path.exists():
            raise FileNotFoundError(f"{path} is gone")
        where |= {row: (path, *places) for row, places in samples_in(path).items()}
    with contextlib.ExitStack() as stack:
        handles = {path: stack.enter_context(open(path, "rb")) for path in sources}
        tar = stack.enter_context(tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT))
        for row in sorted(where):
            path, about, png = where[row]
            _append(tar, f"{key(row)}.json", _read(handles[path], about))
            _append(tar, f"{key(row)}.png", _read(handles[path], png))


def _open_tar(path: Path) -> tarfile.TarFile:
    return tarfile.open(fileobj=open(path, "wb"), mode="w", format=tarfile.USTAR_FORMAT)


def _append(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, no owner: the same pictures make the same bytes
    member.size, member.mode = len(content), 0o644
    tar.addfile(member, io.BytesIO(content))
    tar.members = []  # type: ignore[attr-defined]  # it keeps them all otherwise


def _read(handle: IO[bytes], place: Place) -> bytes:
    handle.seek(place[0])
    return handle.read(place[1])


def about(text: dict[str, str], prompt: str) -> str:
    """What a shard's JSON says of a picture: the recipe as in its PNG, and the prompt as a caption for training."""
    return json.dumps({"caption": prompt, **json.loads(text["sun"])})


def is_whole(picture: Path | IO[bytes]) -> bool:
    """Whether all of a PNG is there: its checksums are right. A machine that fails can leave zeros in a whole name."""
    try:
        with Image.open(picture, formats=("PNG",)) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for what is none
        return False
    return True


def sync(path: Path) -> None:
    """Wait until a file is on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
