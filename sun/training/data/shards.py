"""webdataset shards (LAION style: x.jpg, x.txt or x.json in tar files), streamed by any number of processes.

Each reader (a worker of a process) has its own part of every pass over the shards and reads one shard at a time, its
samples shuffled in a buffer. Its position is (pass, shard, samples taken of the shard), so a resumed run goes on with
the very next sample after reading at most one shard again.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.shardlists import expand_urls

from ...user_pictures import open_picture
from .samples import UNREADABLE, DataError, Encode, Lanes, Skipped, crop, encode_pixels, is_address, to_tensor

PICTURES = ("jpg", "jpeg", "png", "webp")
_BUFFER = 1000


def list_shards(data: str) -> list[str]:
    """The shards that ``data`` names: one, a brace range, several joined by ``::``, or a folder of ``*.tar``.

    Raises FileNotFoundError when local ones are missing; addresses (``https:``, ``pipe:``) are found out when read.
    """
    folder = Path(data)
    shards = sorted(str(p) for p in folder.glob("*.tar")) if folder.is_dir() else list(expand_urls(data))
    missing = [s for s in shards if not is_address(s) and not Path(s).exists()]
    if missing or not shards:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(shards)} shards of {data} do not exist, the first: {', '.join(missing[:3])}. "
            "Check the path and the range, as in laion/{000000..000127}.tar."
        )
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

    def _samples(self, url: str, pass_: int, skipped: Skipped) -> Iterator[dict[str, Any]]:
        def broken(error: Exception) -> bool:
            skipped.add("unreadable shards or members", f"{url} ({error})")
            return True  # go on with what else there is

        yield from wds.DataPipeline(
            wds.SimpleShardList([url]),
            wds.tarfile_to_samples(handler=broken),
            wds.shuffle(_BUFFER, rng=random.Random(f"{self.seed}/{pass_}/{url}")),
        )


def decode(sample: dict[str, Any], resolution: int, skipped: Skipped) -> tuple[Tensor, str] | None:
    """(picture [3, H, W], caption) of a raw sample, or None, counted in ``skipped``."""
    name = f"{sample.get('__url__')}: {sample.get('__key__')}"
    picture = next((sample[suffix] for suffix in PICTURES if suffix in sample), None)
    if picture is None:
        skipped.add("samples without a picture", name)
        return None
    caption = _caption(sample)
    if not caption:
        skipped.add("samples without a caption", name)
        return None
    try:
        return to_tensor(crop(open_picture(picture, name), resolution)), caption
    except UNREADABLE as error:
        skipped.add("unreadable pictures", f"{name} ({error})")
        return None


def _caption(sample: dict[str, Any]) -> str:
    """The sample's .txt, or ``caption`` or ``text`` of its .json (as img2dataset writes them)."""
    if "txt" in sample:
        return bytes(sample["txt"]).decode("utf-8", errors="replace").strip()
    try:
        row = json.loads(sample.get("json", b"{}"))
        return str(row.get("caption") or row.get("text") or "").strip()
    except (ValueError, AttributeError):
        return ""


class ShardSource:
    """A :class:`~.data.Source` that streams shards. workers: processes that decode, 0 for none."""

    def __init__(
        self, shards: list[str], vae: Any, resolution: int, device: torch.device, seed: int, workers: int, lanes: Lanes
    ):
        if len(shards) < lanes.processes:
            raise DataError(
                f"{len(shards)} shards cannot be divided among {lanes.processes} processes: write at least as many."
            )
        self.shards, self.vae, self.resolution, self.device = shards, vae, resolution, device
        self.seed, self.lanes = seed, lanes
        self.workers = min(workers, len(shards) // lanes.processes)  # a worker reads shards of its own
        self.positions = [Position() for _ in range(max(1, self.workers))]
        self.drawn = 0
        self._samples: Iterator[Any] | None = None

    @property
    def skipped(self) -> Skipped:
        """Sum over this process's readers, as of the last sample of each."""
        return Skipped(sum((Counter(p.skipped) for p in self.positions), Counter[str]()))

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
        if len(state["positions"]) != len(self.positions):
            # Other workers now: each goes on in a pass of its own choosing rather than from the start.
            state = {"positions": [{"pass_": state["positions"][0]["pass_"] + 1}] * len(self.positions), "drawn": 0}
        self.positions = [Position(**p) for p in state["positions"]]
        self.drawn, self._samples = state["drawn"], None
