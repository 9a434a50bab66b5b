"""Pictures of scenes as the autoencoder sees them, computed once and kept."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors import safe_open
from tqdm.auto import tqdm

from ...common.cache import cache_dir
from ...common.devices import autocast
from ...common.reading import check_regular
from ...training.data.cache import hash_weights, write_tensors
from .scenes import Scene, random_scene, render_scene
from .sources import Emoji, load_pictures
from .vae import to_tensor


def encode_scenes(
    vae: AutoencoderTiny, emojis: list[Emoji], style: str, size: int, count: int, seed: int
) -> tuple[list[Scene], torch.Tensor]:
    """``count`` scenes and their latents [N, 4, size/8, size/8], times the VAE's scaling factor."""
    scenes, pictures = scenes_in_style(emojis, style, count, seed)
    identity = repr([s.caption for s in scenes])
    latents = encode_pictures(
        vae, f"{style}-{size}", identity, count, lambda i: render_scene(scenes[i], pictures, size)
    )
    return scenes, latents


def scenes_in_style(
    emojis: list[Emoji], style: str, count: int, seed: int
) -> tuple[list[Scene], dict[str, Image.Image]]:
    """``count`` random scenes of the emojis that ``style`` has, and its pictures by code."""
    pictures = load_pictures(style, emojis, 128)
    known = [e for e in emojis if e.code in pictures]
    rng = random.Random(seed)
    return [random_scene(known, rng) for _ in range(count)], pictures


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderTiny, name: str, identity: str, count: int, picture: Callable[[int], Image.Image]
) -> torch.Tensor:
    """Latents [count, 4, h, w], times the VAE's scaling factor, of ``picture(0)``, ``picture(1)``, ...

    They are kept under :func:`cache_dir`, named after everything they depend on: ``identity`` says which pictures these
    are.
    """
    cache = cache_dir() / "latents"
    cache.mkdir(parents=True, exist_ok=True)
    made_from = hashlib.sha256(identity.encode())
    hash_weights(made_from, vae.encoder)
    file = cache / f"{name}-{count}-{made_from.hexdigest()[:16]}.safetensors"
    kept = _kept(file, count)
    if kept is not None:
        return kept
    encoder = vae.encoder.to(memory_format=torch.channels_last)
    device = next(encoder.parameters()).device
    out = []
    for start in tqdm(range(0, count, 64), desc=f"encode {name}px"):
        batch = to_tensor([picture(i) for i in range(start, min(start + 64, count))]).to(device)
        with autocast(device):
            out.append(encoder(batch.contiguous(memory_format=torch.channels_last)).float().cpu())
    latents = torch.cat(out).contiguous() * vae.config.scaling_factor  # the encoder leaves channels last
    write_tensors(file, {"latents": latents})
    return latents


def _kept(file: Path, count: int) -> torch.Tensor | None:
    """The latents in a file of the cache; None where there is none, or a damaged one, which is removed and told of."""
    if not file.exists() and not file.is_symlink():
        return None
    try:
        check_regular(file)
        with safe_open(str(file), "pt") as handle:
            latents: torch.Tensor = handle.get_tensor("latents").clone()
        if latents.ndim == 4 and len(latents) == count and bool(torch.isfinite(latents).all()):
            return latents
    except Exception:  # a damaged header makes safetensors raise anything
        if file.is_dir():
            raise
    tqdm.write(f"the cache {file} is damaged. It is made again.")
    file.unlink()
    return None
