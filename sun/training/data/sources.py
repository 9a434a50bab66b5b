"""Pictures with captions for SUN training: the emoji scenes, a folder, or webdataset shards."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from torch import Tensor

from ...common.settings import ConfigError, read_lines
from ...user_pictures import open_picture
from .samples import (
    UNREADABLE,
    DataError,
    Encode,
    Lanes,
    Order,
    Skipped,
    crop,
    encode_pixels,
    is_address,
    is_emoji,
    to_tensor,
)

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
CACHES = ("", "latents", "latents+text")


class Source(Protocol):
    """``source(count)`` gives (latents [count, 4, h, w] in model units, captions), without end.

    Its state is its position in the data; ``skipped`` counts what was left out.
    """

    @property
    def skipped(self) -> Skipped: ...

    def __call__(self, count: int) -> tuple[Tensor, list[str]]: ...

    def encoder(self, encode: Encode) -> Encode:
        """``encode``, or one that takes the text states kept for this source's captions instead."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def build_source(
    data: str,
    vae: Any,
    resolution: int,
    rng: random.Random,
    device: torch.device,
    *,
    seed: int = 0,
    workers: int = 0,
    cache: str = "",
    encode: Encode | None = None,
) -> Source:
    """A :class:`Source` for ``emoji:STYLE[:SCENES]``, a folder of pictures with captions, or webdataset shards.

    A folder holds ``x.png`` beside ``x.txt``, or a ``metadata.jsonl`` with ``file_name`` and ``text``. Shards are
    ``*.tar`` files, given as one name, as ``{000000..000127}.tar``, as several joined by ``::``, or as a folder.
    rng: draws the emoji scenes (``run.rng``). seed: order of the pictures. workers: processes that decode shards.
    cache: ``latents`` encodes a folder's pictures once and keeps them on disk, ``latents+text`` also the states of
    its captions (``encode`` makes them). Raises DataError, FileNotFoundError or ConfigError.
    """
    if cache not in CACHES:
        raise ConfigError(f"cache takes latents, latents+text or nothing, not {cache!r}.")
    if is_emoji(data):
        _, style, count, *_ = f"{data}::".split(":")
        if count and not (count.isdigit() and int(count)):
            raise ConfigError(f"data = {data}: after the style comes a number of scenes, as emoji:fluent:2500.")
        return EmojiSource(style or "twemoji", vae, resolution, rng, device, int(count or 0))
    folder = Path(data)
    streamed = is_address(data) or data.endswith(".tar") or "{" in data or "::" in data
    if streamed or next(folder.glob("*.tar"), None):
        if cache:
            raise ConfigError("cache works with a folder of pictures; shards are streamed. Leave cache empty.")
        try:
            from .shards import ShardSource, list_shards
        except ImportError as error:
            raise ConfigError(f'shards need webdataset: in a clone, pip install -e ".[train]" ({error}).') from error
        return ShardSource(list_shards(data), vae, resolution, device, seed, workers, Lanes.current())
    pairs = list_folder(folder)
    skipped = Skipped()
    check_pairs(folder, pairs)
    without = _without_caption(folder, pairs)
    if without:
        skipped.add("pictures without a caption", f"{without[0]} has no .txt beside it", len(without))
    if cache:
        from .cache import CachedFolder

        return CachedFolder(pairs, vae, resolution, device, seed, Lanes.current(), skipped,
                            encode if cache == "latents+text" else None)  # fmt: skip
    return FolderSource(pairs, vae, resolution, device, seed, Lanes.current(), skipped)


class EmojiSource:
    """Random scenes of one emoji style, of ``count`` that are encoded first; what is random comes from ``rng``."""

    def __init__(
        self, style: str, vae: Any, resolution: int, rng: random.Random, device: torch.device, count: int = 0
    ):  # fmt: skip
        from ...lab.emoji.base import BaseConfig, encode_scenes
        from ...lab.emoji.sources import load_metadata

        self.rng, self.device, self.skipped = rng, device, Skipped()
        with PartialState().main_process_first():  # the others then read what it wrote
            self.scenes, self.latents = encode_scenes(
                vae, load_metadata(), style, resolution, count or BaseConfig.scenes, 0
            )

    def __call__(self, count: int) -> tuple[Tensor, list[str]]:
        from ...lab.emoji.scenes import caption_of

        picked = [self.rng.randrange(len(self.scenes)) for _ in range(count)]
        return self.latents[picked].to(self.device), [caption_of(self.scenes[i], self.rng) for i in picked]

    def encoder(self, encode: Encode) -> Encode:
        return encode

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class FolderSource:
    """A folder's pictures, read, cropped and encoded when they are drawn; each once a pass, in a new order."""

    def __init__(
        self, pairs: list[tuple[Path, str]], vae: Any, resolution: int, device: torch.device, seed: int, lanes: Lanes,
        skipped: Skipped,
    ):  # fmt: skip
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
        self.calls, self.broken = state["calls"], set(state.get("broken", ()))  # a run with a cache has none
        self.skipped.clear()
        self.skipped.update(state.get("skipped", {}))


def list_folder(folder: Path) -> list[tuple[Path, str]]:
    """(picture, caption) pairs of a folder. Raises FileNotFoundError or DataError when there are none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give data a folder of pictures, or shards (x.tar).")
    metadata = folder / "metadata.jsonl"
    if metadata.exists():
        found = _read_metadata(metadata)
    else:
        pictures = _pictures(folder)
        found = [
            (p, p.with_suffix(".txt").read_text(encoding="utf-8-sig", errors="replace").strip())
            for p in pictures
            if p.with_suffix(".txt").exists()
        ]
    if not found:
        raise FileNotFoundError(
            f"no captioned pictures in {folder}: put x.txt beside every x.png, "
            "or a metadata.jsonl with file_name and text."
        )
    return found


def check_pairs(folder: Path, pairs: list[tuple[Path, str]]) -> None:
    """Raise DataError for pictures that are not there and captions that are empty: mistakes to mend before training.

    (Pictures that are there but cannot be read are found while training, and skipped and counted.)
    """
    missing = [str(path) for path, _ in pairs if not path.exists()]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(pairs)} pictures listed in {folder / 'metadata.jsonl'} do not exist, the "
            f"first: {', '.join(missing[:3])}. Their file_name is relative to {folder}."
        )
    empty = [str(path) for path, caption in pairs if not caption.strip()]
    if empty:
        raise DataError(
            f"{len(empty)} of the {len(pairs)} captions in {folder} are empty, the first: {', '.join(empty[:3])}. "
            "Write them or remove these pictures. (Training without a caption now and then is the setting "
            "empty_captions.)"
        )


def _read_metadata(file: Path) -> list[tuple[Path, str]]:
    pairs = []
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pairs.append((file.parent / row["file_name"], str(row["text"] or "")))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'line {number} of {file} is not like {{"file_name": "x.png", "text": "a caption"}}: '
                f"{type(error).__name__} {error}."
            ) from error
    return pairs


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES)


def _without_caption(folder: Path, pairs: list[tuple[Path, str]]) -> list[Path]:
    if (folder / "metadata.jsonl").exists():
        return []  # it chooses the pictures
    captioned = {path for path, _ in pairs}
    return [p for p in _pictures(folder) if p not in captioned]
