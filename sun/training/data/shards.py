"""webdataset shards (LAION style: x.jpg, x.txt or x.json in tar files), streamed by any number of processes.

Each reader (a worker of a process) has its own part of every pass over the shards and reads one shard at a time, its
samples shuffled in a buffer. Its position is (pass, shard, samples taken of the shard), so a resumed run goes on with
the very next sample after reading at most one shard again.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import torch
from braceexpand import braceexpand
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ...common.settings import ConfigError
from ...user_pictures import open_picture
from .captions import NoCaption, caption_of_row, decode_caption
from .samples import (
    UNREADABLE,
    DataError,
    Encode,
    Lanes,
    Skipped,
    check_position,
    crop,
    encode_pixels,
    is_address,
    is_command,
    to_tensor,
)
from .tars import PICTURES, RawSample, check_address, read_samples, shuffled

MAX_SHARDS = 1_000_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)(?:\.\.-?\d+)?\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


def list_shards(data: str, allow_commands: bool = False) -> list[str]:
    """The shards that ``data`` names: one, a brace range, several joined by ``::``, or a folder of ``*.tar``.

    Raises FileNotFoundError when local ones are missing (addresses are found out when read), DataError for more than a
    million and for an address that is none, and ConfigError for the output of a command unless ``allow_commands``.
    """
    folder = Path(data)
    shards = sorted(str(p) for p in folder.glob("*.tar")) if folder.is_dir() else _expand(data)
    if not allow_commands and (commands := [s for s in shards if is_command(s)]):
        raise ConfigError(
            f"data holds the command {commands[0][:80]!r}, which would run on this machine. If that is your own wish, "
            "write it on the command line: --data 'pipe:...' --allow-commands."
        )
    for shard in shards:
        if is_address(shard) and not is_command(shard):
            check_address(shard)
    missing = [s for s in shards if not is_address(s) and not Path(s).is_file()]
    if missing or not shards:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(shards)} shards of {data} do not exist or are no regular files, the first: "
            f"{', '.join(missing[:3])}. Check the path and the range, as in laion/{{000000..000127}}.tar."
        )
    return shards


def _expand(data: str) -> list[str]:
    too_many = DataError(f"data = {data[:80]} names more than {MAX_SHARDS:,} shards. Check its ranges.")
    shards: list[str] = []
    for pattern in data.split("::"):
        sizes = [
            abs(int(end) - int(begin)) + 1 if len(begin + end) < 40 else MAX_SHARDS + 1
            for begin, end in _RANGE.findall(pattern)
        ]
        sizes += [inside.count(",") + 1 for inside in _CHOICE.findall(pattern)]
        if prod(sizes) > MAX_SHARDS or pattern.count("{") > 100:  # before it is expanded: ranges are kept whole
            raise too_many
        try:
            shards += islice(braceexpand(pattern), MAX_SHARDS + 1 - len(shards))
        except ValueError as error:  # braces that do not match
            raise DataError(f"data = {data[:80]} has a brace too many or too few ({error}).") from error
        if len(shards) > MAX_SHARDS:
            raise too_many
    return shards


@dataclass
class Position:
    """Where one reader stands, and what it left out so far."""

    pass_: int = 0
    shard: int = 0
    taken: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        return {"pass_": self.pass_, "shard": self.shard, "taken": self.taken, "skipped": dict(self.skipped)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Position:
        """The inverse of :meth:`state`. Raises ValueError for what is no position."""
        numbers = {name: check_position(state.get(name, 0)) for name in ("pass_", "shard", "taken")}
        return cls(**numbers, skipped={str(k): check_position(v) for k, v in state.get("skipped", {}).items()})


class ShardReaders(IterableDataset):
    """Yields (reader, picture [3, H, W], caption, Position after it) without end; a DataError ends it.

    The error is yielded in place of a sample, because raised in a worker it would reach the user as a traceback.
    first: the reader of the first worker, which the others follow; so a resumed run takes turns as before.
    """

    def __init__(
        self, shards: list[str], resolution: int, seed: int, lanes: Lanes, positions: list[Position], first: int
    ):
        self.shards, self.resolution, self.seed, self.lanes = shards, resolution, seed, lanes
        self.positions, self.first = positions, first

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        reader = (self.first + (worker.id if worker else 0)) % len(self.positions)
        try:
            for sample in self._read(reader):
                yield (reader, *sample)
        except DataError as error:
            while True:  # whoever asks next shall hear it as well
                yield error

    def _read(self, reader: int) -> Iterator[tuple[Tensor, str, Position]]:
        start = self.positions[reader]
        skipped = Skipped(start.skipped)
        readers = len(self.positions) * self.lanes.processes
        mine = self.lanes.process * len(self.positions) + reader
        begin, taken, pass_ = start.shard, start.taken, start.pass_
        barren: set[int] = set()  # shards that gave nothing since the last sample
        while True:
            order = list(range(len(self.shards)))
            random.Random(f"{self.seed}/{pass_}").shuffle(order)
            good = taken + begin  # a resumed pass has given samples before
            for shard, index in list(enumerate(order[mine::readers]))[begin:]:
                for number, raw in enumerate(self._samples(self.shards[index], pass_, skipped)):
                    if number < taken:
                        continue
                    decoded = decode(raw, self.resolution, skipped)
                    if decoded is not None:
                        good += 1
                        yield (*decoded, Position(pass_, shard, number + 1, dict(skipped)))
                taken = 0
            # With as many readers as shards an empty one is somebody's whole pass; later passes bring others.
            barren = set() if good else barren | set(order[mine::readers])
            if len(barren) == len(self.shards):
                reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "the shards are empty"
                raise DataError(f"the shards gave no sample to train on, all tried: {reasons}.")
            begin, taken, pass_ = 0, 0, pass_ + 1

    def _samples(self, url: str, pass_: int, skipped: Skipped) -> Iterator[RawSample]:
        yield from shuffled(read_samples(url, skipped), random.Random(f"{self.seed}/{pass_}/{url}"))


def decode(sample: RawSample, resolution: int, skipped: Skipped) -> tuple[Tensor, str] | None:
    """(picture [3, H, W], caption) of a raw sample, or None, counted in ``skipped``."""
    picture = next((sample.parts[suffix] for suffix in PICTURES if suffix in sample.parts), None)
    if picture is None:
        skipped.add("samples without a picture", sample.name)
        return None
    try:
        caption = _caption(sample)
    except NoCaption as error:
        skipped.add("captions that are no text", f"{sample.name} {error}")
        return None
    if not caption:
        skipped.add("samples without a caption", sample.name)
        return None
    try:
        return to_tensor(crop(open_picture(picture, sample.name), resolution)), caption
    except UNREADABLE as error:
        skipped.add("unreadable pictures", f"{sample.name} ({error})")
        return None


def _caption(sample: RawSample) -> str:
    """The sample's .txt, or ``caption`` or ``text`` of its .json (as img2dataset writes them)."""
    if "txt" in sample.parts:
        return decode_caption(sample.parts["txt"], sample.name)
    return caption_of_row(sample.parts["json"], sample.name) if "json" in sample.parts else ""


class ShardSource:
    """A :class:`~.sources.Source` that streams shards.

    workers: processes that decode, 0 for none. left_out: what lies beside the shards and is not read.
    """

    def __init__(
        self,
        shards: list[str],
        vae: Any,
        resolution: int,
        device: torch.device,
        seed: int,
        workers: int,
        lanes: Lanes,
        left_out: Skipped | None = None,
    ):
        if len(shards) < lanes.processes:
            raise DataError(
                f"{len(shards)} shards cannot be divided among {lanes.processes} processes: write at least as many."
            )
        self.shards, self.vae, self.resolution, self.device = shards, vae, resolution, device
        self.seed, self.lanes, self.left_out = seed, lanes, left_out or Skipped()
        self.workers = min(workers, len(shards) // lanes.processes)  # a worker reads shards of its own
        self.positions = [Position() for _ in range(max(1, self.workers))]
        self.drawn = 0
        self._samples: Iterator[Any] | None = None

    @property
    def skipped(self) -> Skipped:
        """Sum over this process's readers, as of the last sample of each, and what lies beside the shards."""
        return Skipped(sum((Counter(p.skipped) for p in self.positions), Counter[str](self.left_out)))

    def __call__(self, count: int) -> tuple[Tensor, list[str]]:
        if self._samples is None:
            self._samples = self._start()
        pictures, captions = [], []
        for _ in range(count):
            sample = next(self._samples)
            if isinstance(sample, DataError):
                raise sample
            reader, picture, caption, self.positions[reader] = sample
            pictures.append(picture)
            captions.append(caption)
            self.drawn += 1
        return encode_pixels(self.vae, torch.stack(pictures).to(self.device)), captions

    def _start(self) -> Iterator[Any]:
        first = self.drawn % len(self.positions)
        readers = ShardReaders(self.shards, self.resolution, self.seed, self.lanes, self.positions, first)
        # A generator of its own: the loader would otherwise take a number from the run's.
        return iter(DataLoader(readers, batch_size=None, num_workers=self.workers, generator=torch.Generator()))

    def encoder(self, encode: Encode) -> Encode:
        return encode

    def state_dict(self) -> dict[str, Any]:
        return {"positions": [p.state() for p in self.positions], "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        positions = [Position.of(position) for position in state["positions"]]
        drawn = check_position(state["drawn"])
        if len(positions) != len(self.positions):
            # Other workers now: each goes on in a pass of its own choosing rather than from the start.
            positions, drawn = [Position(positions[0].pass_ + 1) for _ in self.positions], 0
        self.positions, self.drawn, self._samples = positions, drawn, None
