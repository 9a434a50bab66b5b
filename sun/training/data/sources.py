"""Pictures with captions for SUN training: the emoji scenes, a folder, or webdataset shards."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...common.settings import ConfigError
from ...common.worlds import EMOJI, find, world_of
from ..config import RunConfig
from ..models import encoder_of, pixels_of
from ..run import TrainingRun
from .captioned import FolderSource, check_pairs, left_out, list_folder
from .samples import Encode, Lanes, Skipped, is_address

CACHES = ("", "latents", "latents+text")
MAX_SCENES = 10_000_000


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


class DataSettings(Protocol):
    """The settings of a training that say where its pictures come from; ``SunTrainConfig`` explains them."""

    run: RunConfig
    data: str
    cache: str
    workers: int
    resolution: int
    allow_commands: bool


def source_of(config: DataSettings, pipe: Any, run: TrainingRun) -> Source:
    """The pictures of a training, whose place in the data is kept in the run's checkpoints.

    Raises as :func:`build_source`.
    """
    source = build_source(
        config.data,
        pipe.vae,
        pixels_of(pipe, config.resolution),
        run.rng,
        run.accelerator.device,
        seed=config.run.seed,
        workers=config.workers,
        cache=config.cache,
        encode=encoder_of(pipe),
        allow_commands=config.allow_commands,
    )
    return run.track("data", source)


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
    allow_commands: bool = False,
) -> Source:
    """A :class:`Source` for ``emoji:STYLE[:SCENES]``, a folder of pictures with captions, or webdataset shards.

    A folder holds ``x.png`` beside ``x.txt``, or a ``metadata.jsonl`` or ``.csv`` with ``file_name`` and ``text``.
    Shards are ``*.tar`` files, given as one name, as ``{000000..000127}.tar``, as several joined by ``::``, or as a
    folder. rng: draws the emoji scenes (``run.rng``). seed: order of the pictures. workers: processes that decode
    shards. cache: ``latents`` encodes a folder's pictures once and keeps them on disk, ``latents+text`` also the states
    of its captions (``encode`` makes them). allow_commands: whether a shard may be the output of a command
    (``pipe:...``). Raises DataError, FileNotFoundError or ConfigError.
    """
    if cache not in CACHES:
        raise ConfigError(f"cache takes latents, latents+text or nothing, not {cache!r}.")
    if world_of(data) == EMOJI:
        return _emoji_source(data, vae, resolution, rng, device)
    folder = Path(data)
    if is_address(data) or data.endswith(".tar") or "{" in data or "::" in data or next(folder.glob("*.tar"), None):
        if cache:
            raise ConfigError("cache works with a folder of pictures; shards are streamed. Leave cache empty.")
        try:
            from .shards import ShardSource, list_shards
        except ImportError as error:
            raise ConfigError(f'shards need webdataset: in a clone, pip install -e ".[train]" ({error}).') from error
        shards = list_shards(data, allow_commands)
        skipped = left_out(folder, [], shards=True) if folder.is_dir() else Skipped()
        return ShardSource(shards, vae, resolution, device, seed, workers, Lanes.current(), skipped)
    pairs = list_folder(folder)
    check_pairs(folder, pairs)
    skipped = left_out(folder, pairs)
    if not cache:
        return FolderSource(pairs, vae, resolution, device, seed, Lanes.current(), skipped)
    from .cache import CachedFolder

    texts = encode if cache == "latents+text" else None
    return CachedFolder(pairs, vae, resolution, device, seed, Lanes.current(), skipped, texts)


def _emoji_source(data: str, vae: Any, resolution: int, rng: random.Random, device: torch.device) -> Source:
    _, style, count, *_ = f"{data}::".split(":")
    if count and not (count.isdecimal() and 0 < int(count) <= MAX_SCENES):
        raise ConfigError(f"data = {data}: after the style comes a number of scenes, as emoji:fluent:2500.")
    source: Source = find(EMOJI, "source")(style or "twemoji", vae, resolution, rng, device, int(count or 0))
    return source
