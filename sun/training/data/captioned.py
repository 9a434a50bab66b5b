"""A folder of pictures with captions: which belong together, what is left out, and reading them in turn."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from ...common.reading import ReadError, parse_json, printable, read_text
from ...user_pictures import open_picture
from .captions import NoCaption, caption_of, read_caption
from .samples import (
    UNREADABLE,
    DataError,
    Encode,
    Lanes,
    Order,
    Skipped,
    check_position,
    crop,
    encode_pixels,
    to_tensor,
)

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
METADATA = ("metadata.jsonl", "metadata.csv")
_MAX_METADATA = 2**30
# Not read, but somebody may believe that they are.
_OTHER_PICTURES = {
    ".avif",
    ".heic",
    ".heif",
    ".jxl",
    ".jp2",
    ".psd",
    ".svg",
    ".tga",
    ".ppm",
    ".ico",
    ".eps",
    ".exr",
    ".raw",
    ".dng",
}
_ARCHIVES = {".tar", ".tgz", ".gz", ".bz2", ".xz", ".zip", ".7z", ".rar", ".parquet", ".arrow"}

Pairs = list[tuple[Path, str]]


def list_folder(folder: Path) -> Pairs:
    """(picture, caption) pairs of a folder: those of its metadata file, else every picture with a ``.txt`` beside it.

    Raises FileNotFoundError when there are none, DataError for captions that are no texts.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give data a folder of pictures, or shards (x.tar).")
    metadata = metadata_file(folder)
    found = _read_metadata(metadata) if metadata else _read_captions(folder)
    if not found:
        raise FileNotFoundError(
            f"no captioned pictures in {folder}: put x.txt beside every x.png, "
            "or a metadata.jsonl (or .csv) with file_name and text."
        )
    return found


def metadata_file(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).exists()), None)


def check_pairs(folder: Path, pairs: Pairs) -> None:
    """Raise DataError for pictures that are not there and captions that are empty: mistakes to mend before training.

    (Pictures that are there but cannot be read are found while training, and skipped and counted.)
    """
    missing = [str(path) for path, _ in pairs if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(pairs)} pictures listed in {metadata_file(folder) or folder} do not exist, "
            f"the first: {', '.join(missing[:3])}. Their file_name is relative to {folder}."
        )
    empty = [str(path) for path, caption in pairs if not caption.strip()]
    if empty:
        raise DataError(
            f"{len(empty)} of the {len(pairs)} captions in {folder} are empty, the first: {', '.join(empty[:3])}. "
            "Write them or remove these pictures. (Training without a caption now and then is the setting "
            "empty_captions.)"
        )


def left_out(folder: Path, pairs: Pairs, shards: bool = False) -> Skipped:
    """What lies in a folder and is not trained on, counted by reason and named.

    ``shards``: the folder is read as the shards at its top, and ``pairs`` is empty.
    """
    taken = {path for path, _ in pairs}
    captioned = {path.with_suffix("") for path in taken}
    top = set(folder.glob("*.tar")) if shards else set()
    others: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if file.name.startswith(".") or file in taken or file in top or (file.is_dir() and not file.is_symlink()):
            continue
        reason = _why_left_out(file, captioned, metadata_file(folder), shards)
        if reason:
            others.setdefault(reason, []).append(file)
    skipped = Skipped()
    for reason, files in others.items():
        skipped.add(reason, f"{files[0]} is not read", len(files))
    return skipped


def _why_left_out(file: Path, captioned: set[Path], metadata: Path | None, shards: bool) -> str:
    suffix = file.suffix.lower()
    if suffix in PICTURE_SUFFIXES | _OTHER_PICTURES and not file.is_file():
        return "pictures that are no regular files"
    if suffix in _OTHER_PICTURES:
        return f"pictures of a kind that is not read ({suffix})"
    if suffix in PICTURE_SUFFIXES:
        if shards:
            return "pictures beside shards"
        return f"pictures that {metadata.name} does not list" if metadata else "pictures without a caption"
    if suffix in _ARCHIVES:
        return "archives" if suffix != ".tar" else "shards in subfolders"
    if suffix == ".txt" and not shards and not metadata and file.with_suffix("") not in captioned:
        return "captions without a picture"
    if file.name in METADATA and file != metadata:
        return "second files of metadata"
    return ""


def _read_captions(folder: Path) -> Pairs:
    pairs, wrong = [], []
    pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
    for picture in pictures:
        file = picture.with_suffix(".txt")
        if not file.exists():
            continue
        try:
            pairs.append((picture, read_caption(file)))
        except NoCaption as error:
            wrong.append(f"{file} {error}")
    if wrong:
        raise DataError(
            f"{len(wrong)} of the {len(pairs) + len(wrong)} captions in {folder} are no texts: {'; '.join(wrong[:3])}. "
            "Save them as text in UTF-8, or remove these pictures."
        )
    return pairs


def _read_metadata(file: Path) -> Pairs:
    rows = {".jsonl": _json_rows, ".csv": _csv_rows}[file.suffix]
    try:
        text = read_text(file, _MAX_METADATA)
    except ReadError as error:
        raise DataError(str(error)) from error
    pairs = []
    for where, row in rows(text, str(file)):
        name = row.get("file_name")
        if not isinstance(name, str) or not name or "text" not in row:
            raise DataError(f'{where} is not like {{"file_name": "x.png", "text": "a caption"}}: it has {_names(row)}.')
        if not _stays_below(name):
            raise DataError(
                f"{where} names a picture outside of {file.parent}: {printable(name)}. Its file_name is a path below "
                "that folder; move the picture there, or link to its folder from there."
            )
        try:
            pairs.append((file.parent / name, caption_of(row["text"])))
        except NoCaption as error:
            raise DataError(f"{where} {error}.") from error
    return pairs


def _stays_below(name: str) -> bool:
    """Whether a path of a stranger's list is relative and climbs nowhere, by the rules of either system."""
    return not any(
        path.is_absolute() or path.drive or ".." in path.parts for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def _json_rows(text: str, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not str.splitlines, which also divides at characters that a caption may hold, U+2028 among them.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"line {number} of {file}"
            try:
                row = parse_json(line, where)
            except ReadError as error:
                raise DataError(str(error)) from error
            if not isinstance(row, dict):
                raise DataError(f'{where} is not like {{"file_name": "x.png", "text": "a caption"}}.')
            yield where, row


def _csv_rows(text: str, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise DataError(f"line {reader.line_num} of {file} has more columns than the first line names.")
            yield f"line {reader.line_num} of {file}", row
    except csv.Error as error:
        raise DataError(f"line {reader.line_num} of {file} is not valid CSV: {error}.") from error


def _names(row: dict[str, Any]) -> str:
    return ", ".join(f"{str(name)[:40]}" for name in list(row)[:5]) or "nothing"


class FolderSource:
    """A folder's pictures, read, cropped and encoded when they are drawn; each once a pass, in a new order."""

    def __init__(
        self, pairs: Pairs, vae: Any, resolution: int, device: torch.device, seed: int, lanes: Lanes, skipped: Skipped
    ):
        self.pairs, self.vae, self.resolution, self.device = pairs, vae, resolution, device
        self.order, self.lanes, self.skipped = Order(len(pairs), seed), lanes, skipped
        self.calls = 0
        self.broken: set[int] = set()

    def __call__(self, count: int) -> tuple[Tensor, list[str]]:
        first = self.lanes.batch_number(self.calls) * count
        self.calls += 1
        drawn = [self._read(self.order[first + i]) for i in range(count)]
        pixels = torch.stack([picture for picture, _ in drawn]).to(self.device)
        return encode_pixels(self.vae, pixels), [caption for _, caption in drawn]

    def _read(self, index: int) -> tuple[Tensor, str]:
        """The picture, or the next one in the list that can be read."""
        for number in range(index, index + len(self.pairs)):
            index = number % len(self.pairs)
            if index in self.broken:
                continue
            path, caption = self.pairs[index]
            try:
                return to_tensor(crop(open_picture(path), self.resolution)), caption
            except UNREADABLE as error:
                self.broken.add(index)
                self.skipped.add("unreadable pictures", f"{path} ({error})")
        raise DataError(f"none of the {len(self.pairs)} pictures can be read; the first is {self.pairs[0][0]}.")

    def encoder(self, encode: Encode) -> Encode:
        return encode

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls, "broken": sorted(self.broken), "skipped": dict(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        broken = [check_position(index) for index in state.get("broken", ())]  # a run with a cache has none
        self.calls, self.broken = check_position(state["calls"]), set(broken)
        kept = {str(reason): check_position(count) for reason, count in state.get("skipped", {}).items()}
        if kept:
            self.skipped.clear()
            self.skipped.update(kept)
