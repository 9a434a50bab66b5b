"""What every source of training pictures shares: who reads what, what was left out, pictures to tensors."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.state import GradientState
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm

from ...common.reading import printable
from ...user_pictures import on_white, upright

Encode = Callable[[list[str]], Tensor]
"""Texts -> text states [B, L, D]."""

# What PIL raises for files that are no pictures, are cut off, claim absurd sizes or do not fit into memory.
UNREADABLE = (OSError, UnidentifiedImageError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError)


def is_address(data: str) -> bool:
    """An address or a command that gives a shard (``https:``, ``pipe:``), rather than a file."""
    return "://" in data or is_command(data)


def is_command(shard: str) -> bool:
    """Whether ``shard`` is the output of a program that this machine would have to run."""
    return shard.strip().lower().startswith("pipe:")


def check_position(value: Any) -> int:
    """``value`` of a checkpoint as a place in the data or a count. Raises ValueError unless it is one, from 0 up."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise ValueError(f"{str(value)[:40]!r} is no place in the data")
    return value


class DataError(ValueError):
    """Training data that cannot be used; the message says what is wrong where, and what to do."""


class Skipped(Counter[str]):
    """Samples left out, by reason. Says so at the 1st, 2nd, 4th, 8th, ... of them: never silent, never a flood."""

    def add(self, reason: str, what: str, count: int = 1) -> None:
        before = sum(self.values())
        self[reason] += count
        total = before + count
        if total.bit_length() > before.bit_length():
            each = ", ".join(f"{n} {r}" for r, n in self.items())
            tqdm.write(printable(f"skipped {total} samples so far ({each}); the last: {what}"))


@dataclass(frozen=True)
class Lanes:
    """Divides a sequence of batches among processes and micro-batches.

    The batches of a step are numbered process by process, so that 2 processes read what 1 process with
    ``accumulate`` = 2 reads.
    """

    process: int = 0
    processes: int = 1
    accumulate: int = 1

    @classmethod
    def current(cls) -> Lanes:
        """Those of the run that is going on, as accelerate knows it."""
        state = PartialState()
        return cls(state.process_index, state.num_processes, GradientState().num_steps)

    def batch_number(self, call: int) -> int:
        """Number in the whole sequence of the batch that this process draws ``call``-th (from 0)."""
        step, micro = divmod(call, self.accumulate)
        return (step * self.processes + self.process) * self.accumulate + micro


class Order:
    """An endless random order of ``length`` things that visits each once before any comes again.

    The same for every process, and anything in it can be asked for directly.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed
        self._passes: dict[int, list[int]] = {}

    def __getitem__(self, number: int) -> int:
        index, position = divmod(number, self.length)
        if index not in self._passes:
            order = list(range(self.length))
            random.Random(f"{self.seed}/{index}").shuffle(order)
            self._passes = {k: v for k, v in self._passes.items() if k == index - 1} | {index: order}
        return self._passes[index][position]


def crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of a picture, upright, on white where it is transparent, scaled to ``size``."""
    image = upright(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))  # first: a thin picture grows huge
    return on_white(image).resize((size, size), Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as [3, H, W] in -1..1."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1.0).permute(2, 0, 1)


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor, sample: bool = True) -> Tensor:
    """Latents [B, 4, H/8, W/8] in model units of pictures [B, 3, H, W] in -1..1.

    ``sample`` draws from the autoencoder's posterior; otherwise its mean is taken.
    """
    encoded = vae.encode(pixels)
    if hasattr(encoded, "latents"):  # AutoencoderTiny has no posterior
        latents = encoded.latents
    else:
        latents = encoded.latent_dist.sample() if sample else encoded.latent_dist.mode()
    scaled: Tensor = latents.float() * vae.config.scaling_factor
    return scaled
