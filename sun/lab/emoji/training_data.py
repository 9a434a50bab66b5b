"""What training asks of the emoji world by its name ``emoji:STYLE``: pictures with captions, and prompts to look at."""

from __future__ import annotations

import random
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from ...training.data.samples import Encode, Skipped
from .base import SAMPLE_PROMPTS, BaseConfig
from .latents import encode_scenes
from .scenes import caption_of
from .sources import load_metadata

SAMPLES = (SAMPLE_PROMPTS[:8], ("", "", "white background", "", "small", "", "pink background, blurry", ""))
"""(prompts, negatives) of the pictures that are drawn while training."""


class EmojiSource:
    """Random scenes of one emoji style, of ``count`` that are encoded first; what is random comes from ``rng``."""

    def __init__(self, style: str, vae: Any, resolution: int, rng: random.Random, device: torch.device, count: int = 0):
        self.rng, self.device, self.skipped = rng, device, Skipped()
        with PartialState().main_process_first():  # the others then read what it wrote
            self.scenes, self.latents = encode_scenes(
                vae, load_metadata(), style, resolution, count or BaseConfig.scenes, 0
            )

    def __call__(self, count: int) -> tuple[Tensor, list[str]]:
        picked = [self.rng.randrange(len(self.scenes)) for _ in range(count)]
        return self.latents[picked].to(self.device), [caption_of(self.scenes[i], self.rng) for i in picked]

    def encoder(self, encode: Encode) -> Encode:
        return encode

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
