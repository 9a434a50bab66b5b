"""Pictures of scenes as the autoencoder sees them, computed once and kept."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from functools import partial

import torch
from diffusers import AutoencoderTiny
from PIL import Image
from tqdm.auto import tqdm

from ...common.cache import cache_dir
from ...common.devices import autocast
from ...training.data.cache import hash_weights, read_tensors, write_tensors
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
    emojis: list[Emoji], style: str, count: int, seed: int, size: int = 128
) -> tuple[list[Scene], dict[str, Image.Image]]:
    """``count`` random scenes of the emojis that ``style`` has, and its pictures of ``size`` pixels by code."""
    pictures = load_pictures(style, emojis, size)
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
    if kept := read_tensors(file, partial(_are_latents, count)):
        return kept["latents"]
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


def _are_latents(count: int, found: dict[str, torch.Tensor]) -> bool:
    latents = found["latents"]
    return latents.ndim == 4 and len(latents) == count and bool(torch.isfinite(latents).all())
