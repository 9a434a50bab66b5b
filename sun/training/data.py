"""Pictures with captions for SUN training: the emoji scenes, a folder, or webdataset shards."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Source = Callable[[int], tuple[Tensor, list[str]]]
"""count -> (latents [B, 4, h, w] in model units, captions)."""

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def build_source(data: str, vae: Any, resolution: int, rng: random.Random, device: torch.device) -> Source:
    """A :data:`Source` for ``emoji:STYLE``, a folder of pictures with captions, or webdataset shards (``*.tar``).

    A folder holds ``x.png`` beside ``x.txt``, or a ``metadata.jsonl`` with ``file_name`` and ``text``.
    """
    if data.startswith("emoji"):
        return _emoji_source(data.partition(":")[2] or "twemoji", vae, resolution, rng, device)
    pairs = _webdataset_pairs(data, rng) if data.endswith(".tar") or "{" in data else _folder_pairs(Path(data), rng)

    @torch.no_grad()
    def draw(count: int) -> tuple[Tensor, list[str]]:
        images, captions = zip(*(next(pairs) for _ in range(count)), strict=True)
        pixels = torch.stack([_to_tensor(_crop(i, resolution)) for i in images]).to(device)
        encoded = vae.encode(pixels)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.sample()
        return latents.float() * vae.config.scaling_factor, list(captions)

    return draw


def _emoji_source(style: str, vae: Any, resolution: int, rng: random.Random, device: torch.device) -> Source:
    from ..emoji.base import BaseConfig, caption_of, encode_scenes
    from ..emoji.sources import load_metadata

    scenes, latents = encode_scenes(vae, load_metadata(), style, resolution, BaseConfig.scenes, 0)

    def draw(count: int) -> tuple[Tensor, list[str]]:
        picked = [rng.randrange(len(scenes)) for _ in range(count)]
        return latents[picked].to(device), [caption_of(scenes[i], rng) for i in picked]

    return draw


def _crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to ``size`` and cut the centre square."""
    image = image.convert("RGB")
    scale = size / min(image.size)
    image = image.resize(
        (max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1.0).permute(2, 0, 1)


def _folder_pairs(folder: Path, rng: random.Random) -> Iterator[tuple[Image.Image, str]]:
    items = list_folder(folder)
    while True:
        rng.shuffle(items)
        for path, caption in items:
            yield Image.open(path), caption


def list_folder(folder: Path) -> list[tuple[Path, str]]:
    """(picture, caption) pairs of a folder. Raises ``FileNotFoundError`` when there are none."""
    metadata = folder / "metadata.jsonl"
    if metadata.exists():
        rows = [json.loads(line) for line in metadata.read_text().splitlines() if line.strip()]
        found = [(folder / r["file_name"], r["text"]) for r in rows]
    else:
        pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES)
        found = [(p, p.with_suffix(".txt").read_text().strip()) for p in pictures if p.with_suffix(".txt").exists()]
    if not found:
        raise FileNotFoundError(
            f"no captioned pictures in {folder}: put x.txt beside every x.png, "
            "or a metadata.jsonl with file_name and text."
        )
    return found


def _webdataset_pairs(urls: str, rng: random.Random) -> Iterator[tuple[Image.Image, str]]:
    import webdataset as wds

    shards = wds.WebDataset(urls, shardshuffle=100, seed=rng.randrange(2**31), empty_check=False).shuffle(1000)
    stream = shards.decode("pil").to_tuple("png;jpg;jpeg;webp", "txt").repeat()
    yield from stream
