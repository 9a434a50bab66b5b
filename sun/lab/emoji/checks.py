"""Figures for the cards of Emoji Diffusion's ControlNet and inpainting model, from scenes drawn for the purpose."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ...adapter import SunAdapter
from ...common.markdown import table
from ...common.settings import ConfigError
from ...pictures.png import grid, to_images
from ...pipelines.attach import attach, detach
from ...pipelines.schedulers import make_scheduler
from ...shipped import EMOJI_SUN
from ...shipped.edges import edge_agreement, find_edges
from .colours import HELD_OUT, Colours, load_autoencoder, measure, object_colours
from .scenes import Scene, posed, random_scene, render_scene
from .sources import load_metadata, load_pictures
from .vae import to_tensor

REFERENCE_STEPS = 25
SUN_STEPS = 4
_SEED = 20_000  # far from the seeds that draw training scenes


@dataclass(frozen=True)
class Scenes:
    """Scenes that training has (but for chance) not shown: ``pixels`` [N, 3, h, w] in -1..1."""

    scenes: list[Scene]
    pictures: dict[str, Image.Image]
    pixels: Tensor

    @property
    def captions(self) -> list[str]:
        return [scene.caption for scene in self.scenes]


def draw_scenes(style: str, emojis: str, count: int, size: int, pose: bool = False) -> Scenes:
    """Scenes for a check; with ``pose`` each is turned and stretched in a way its caption does not tell."""
    known = load_metadata(emojis)
    pictures = load_pictures(style, known, 128)
    rng = random.Random(_SEED)
    scenes = [random_scene([e for e in known if e.code in pictures], rng) for _ in range(count)]
    drawn = [render_scene(scene, pictures, size) for scene in scenes]
    if pose:
        drawn = [posed(picture, scene, rng) for picture, scene in zip(drawn, scenes, strict=True)]
    return Scenes(scenes, pictures, to_tensor(drawn))


def colour_figures(where: str | Path, style: str = "twemoji", emojis: str = "wide") -> Colours:
    """What the autoencoder in a folder does to the colours of backgrounds and emoji, and its PSNR on held-out scenes.

    Where the pictures cannot be had it says so and leaves the PSNR out. Raises ConfigError for a folder without an
    autoencoder and for a style of unknown colours.
    """
    vae, objects = load_autoencoder(where), object_colours(style, emojis)
    try:
        held_out = draw_scenes(style, emojis, HELD_OUT, 128).pixels
    except ConfigError as error:
        tqdm.write(f"PSNR is not measured: {error}")
        held_out = None
    return measure(vae, objects, held_out)


def adapter_for(model: str) -> SunAdapter | None:
    """The shipped SUN adapter, where ``model`` is the base it is for."""
    return SunAdapter.load(EMOJI_SUN) if model == "emoji" and EMOJI_SUN.is_file() else None


@torch.no_grad()
def draw(
    pipe: Any, captions: list[str], guidance: float, adapter: SunAdapter | None = None, steps: int = 0, **inputs: Any
) -> Tensor:
    """Pictures [N, 3, h, w] in -1..1 of a diffusers pipeline, picture i from seed i.

    With ``adapter`` in SUN's 4 steps, else in 25 of DPM-Solver++ with CFG ``guidance``, or in ``steps``. ``inputs`` are
    the pipeline's own.
    """
    plain = pipe.scheduler
    pipe.set_progress_bar_config(disable=True)
    if adapter is None:
        pipe.scheduler = make_scheduler("dpmpp_2m", plain.config)
    else:
        attach(pipe, adapter)
    try:
        images = pipe(
            captions,
            num_inference_steps=steps or (SUN_STEPS if adapter else REFERENCE_STEPS),
            output_type="pt",
            generator=[torch.Generator().manual_seed(i) for i in range(len(captions))],
            **({} if adapter else {"guidance_scale": guidance}),
            **inputs,
        ).images
    finally:
        if adapter is not None:
            detach(pipe)
        pipe.scheduler = plain
    return images.float().cpu() * 2 - 1


def control_figures(drawn: Mapping[str, Tensor], pixels: Tensor) -> dict[str, float]:
    """Edge agreement (F1 within 2 pixels, 0 to 1) of each method's pictures with the edges of ``pixels``."""
    edges = find_edges(pixels / 2 + 0.5)
    return {name: float(edge_agreement(made / 2 + 0.5, edges).mean()) for name, made in drawn.items()}


def inpainting_figures(drawn: Mapping[str, Tensor], pixels: Tensor, masks: Tensor) -> dict[str, dict[str, float]]:
    """Mean absolute differences (grey levels of 255) from ``pixels`` outside and inside the masks [N, 1, h, w].

    ``seam`` is the part of the inside within 4 pixels of the outside, where what is drawn has to go on from what is
    there.
    """
    inside = masks > 0.5
    seam = inside & (F.max_pool2d((~inside).float(), 9, stride=1, padding=4) > 0.5)
    found = {}
    for name, made in drawn.items():
        difference = (made.clamp(-1, 1) - pixels).abs().mean(1, keepdim=True) * 127.5
        parts = {"outside": ~inside, "inside": inside, "seam": seam}
        found[name] = {part: float(difference[where].mean()) for part, where in parts.items()}
    return found


def sheet(rows: Mapping[str, Tensor], count: int) -> Image.Image:
    """The first ``count`` pictures of each row ([N, 3, h, w] in -1..1), with the rows' names above them."""
    images = [image for row in rows.values() for image in to_images(row[:count])]
    return grid(images, min(count, len(next(iter(rows.values())))), list(rows))


def figure_table(figures: Mapping[str, float | Mapping[str, float]], head: str, format: Callable[[float], str]) -> str:
    """Markdown table: a row a method, a column a figure."""
    rows = {name: value if isinstance(value, Mapping) else {head: value} for name, value in figures.items()}
    columns = list(next(iter(rows.values())))
    return table(["", *columns], ([name, *(format(row[c]) for c in columns)] for name, row in rows.items()))
