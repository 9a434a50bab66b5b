"""Train the AutoencoderTiny (TAESD layout: 8x, 4 latent channels) of Emoji Diffusion."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from PIL import Image

from ...common.settings import ConfigError
from ...pictures.png import save_grid, to_images
from ...pipelines.loading import load_part
from ...training.config import RunConfig
from ...training.run import TrainingRun, start_run
from .colours import in_a_line, measure
from .flat_colours import Extrapolation, colours_of_all_kinds, named_colours
from .runs import emoji_run
from .scenes import random_scene, render_scene
from .sources import check_style, load_metadata, load_pictures

FLAT = 32  # pixels to a side of a flat picture


@dataclass
class ColourTerm:
    """So that guidance, which extrapolates latents, saturates a colour and does not turn it into another (colours.py):
    the weight of the error of an affine map from the latents to the picture averaged over 8 x 8 pixels.
    """

    colour_weight: float = 1.0
    colour_relax: float = 0.3  # share of the run, at its end, in which that weight falls to ...
    colour_end: float = 0.1  # ... this share of itself, when the map is learned and detail can have more room

    def check_colours(self) -> None:
        """Raise ConfigError for numbers outside their range."""
        if self.colour_weight < 0:
            raise ConfigError("colour_weight is 0 or above.")
        if not (0 <= self.colour_relax <= 1 and 0 <= self.colour_end <= 1):
            raise ConfigError("colour_relax and colour_end are shares, from 0 to 1.")

    def colour_weight_at(self, fraction: float) -> float:
        """The colour term's weight when that share of the run is done."""
        left = 1 - fraction
        if not self.colour_relax or left >= self.colour_relax:
            return self.colour_weight
        return self.colour_weight * (self.colour_end + (1 - self.colour_end) * left / self.colour_relax)


@dataclass
class VaeConfig(ColourTerm):
    """Crops of ``crop`` pixels are cut from scenes of ``size`` pixels."""

    run: RunConfig = field(default_factory=lambda: emoji_run("runs/emoji-vae", 4000, 2e-3, weight_decay=0.0))
    style: str = "twemoji"
    extra_styles: tuple[str, ...] = ()
    init_vae: str = ""  # a diffusers folder to go on from
    freeze_encoder: bool = False  # train the decoder alone: latents, and whatever was trained on them, stay valid
    size: int = 128
    crop: int = 64
    edge_weight: float = 0.5
    latent_noise: float = 0.1  # the decoder sees latents with noise of up to this standard deviation
    latent_weight: float = 0.05
    colour_map: Literal["fixed", "fitted"] = "fixed"
    # Flat pictures in a step, every second in the colour of a background or an object, the others in any: half of them
    # have their latents scaled, half extrapolated from one to another, and must become the colours moved alike.
    flat_batch: int = 0
    flat_weight: float = 0.25  # of their error against that of the crops

    def check(self) -> None:
        """Raise ConfigError for an unknown style and for numbers outside their range."""
        check_style(self.style)
        self.check_colours()
        if min(self.latent_noise, self.latent_weight, self.edge_weight, self.flat_weight, self.flat_batch) < 0:
            raise ConfigError("latent_noise, latent_weight, edge_weight, flat_weight and flat_batch are 0 or above.")
        if self.size % 8:
            raise ConfigError(f"size is a multiple of 8 pixels, not {self.size}.")
        if self.crop % 8 or not 8 <= self.crop <= self.size:
            raise ConfigError(f"crop is a multiple of 8 pixels up to size ({self.size}), not {self.crop}.")


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """RGB pictures -> [B, 3, H, W] in -1..1."""
    array = np.stack([np.asarray(i, dtype=np.float32) for i in images]) / 127.5 - 1.0
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def _gradients(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor, edge_weight: float) -> torch.Tensor:
    """L1 of the pixels plus L1 of their gradients (edges are what an emoji is made of)."""
    edges = sum(F.l1_loss(a, b) for a, b in zip(_gradients(output), _gradients(target), strict=True))
    return F.l1_loss(output, target) + 2 * F.mse_loss(output, target) + edge_weight * edges


def far_from_standard(latents: torch.Tensor) -> torch.Tensor:
    """How far the channels of latents [B, C, h, w] are from mean 0 and standard deviation 1: a sum of mean squares."""
    return latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()


class ColourMap(torch.nn.Module):
    """Latents [B, 4, h, w] to the small picture [B, 3, h, w] in -1..1 that they stand for: one affine map of channels.

    ``fitted``: the map is trained along; else it is fixed: the first channel is brightness, the second red against
    green, the third yellow against blue, and the fourth is free for detail.
    """

    FIXED = ((0.55, 0.35, 0.25, 0.0), (0.55, -0.35, 0.10, 0.0), (0.55, 0.0, -0.40, 0.0))

    def __init__(self, fitted: bool):
        super().__init__()
        self.linear = torch.nn.Parameter(torch.tensor(self.FIXED), requires_grad=fitted)
        self.offset = torch.nn.Parameter(torch.zeros(3), requires_grad=fitted)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.einsum("rc,bchw->brhw", self.linear, latents) + self.offset.view(1, 3, 1, 1)


class Flat(NamedTuple):
    """Flat pictures of ``colours`` [N, 3] in -1..1, and how their latents are moved."""

    colours: torch.Tensor
    extrapolation: Extrapolation

    def pixels(self) -> torch.Tensor:
        """[N, 3, FLAT, FLAT]."""
        return self.colours[..., None, None].expand(-1, -1, FLAT, FLAT).contiguous(memory_format=torch.channels_last)

    @classmethod
    def draw(cls, count: int, named: torch.Tensor, rng: random.Random) -> Flat:
        """Every second colour is one of ``named``."""
        colours = colours_of_all_kinds(count, rng.randrange(2**31)).to(named)
        some = [rng.randrange(len(named)) for _ in range(count // 2)]
        colours[1::2] = named[some]
        return cls(colours, Extrapolation.draw(count, named.device))


class Autoencoding(torch.nn.Module):
    """One training pass through the autoencoder as one module, so that several processes average its gradients."""

    def __init__(self, vae: AutoencoderTiny, fitted_colours: bool = False):
        super().__init__()
        self.vae = vae
        self.colours = ColourMap(fitted_colours)

    def forward(
        self, pixels: torch.Tensor, noise: torch.Tensor, flat: Flat | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pixels [B, 3, H, W], noise [B, 4, H/8, W/8] added to the latents -> (latents, restored pixels, colour term,
        flat term), fp32.

        The colour term is the mean squared error of the colours that the latents give, the flat term that of the
        pictures made of the moved latents of ``flat``; 0 without.
        """
        latents = self.vae.encoder(pixels).float()
        restored = self._decode(latents + noise)
        moved = restored.new_zeros(())
        if flat is not None:
            wanted = flat.extrapolation.of(flat.colours).clamp(-1, 1)[..., None, None]
            made = self._decode(flat.extrapolation.of(self.vae.encoder(flat.pixels()).float()))
            moved = F.l1_loss(made, wanted.expand_as(made)) + 2 * F.mse_loss(made, wanted.expand_as(made))
        with torch.autocast(latents.device.type, enabled=False):
            colour = F.mse_loss(self.colours(latents), F.avg_pool2d(pixels.float(), 8))
        return latents, restored, colour, moved

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        restored: torch.Tensor = self.vae.decoder(latents.contiguous(memory_format=torch.channels_last))
        return restored.float()


def train_vae(config: VaeConfig) -> Path:
    """Train, write ``<output>/vae`` (diffusers folder) and sample grids; returns the folder."""
    config.check()
    vae = load_part(AutoencoderTiny, Path(config.init_vae), torch.float32) if config.init_vae else AutoencoderTiny()
    vae.to(memory_format=torch.channels_last)
    vae.encoder.requires_grad_(not config.freeze_encoder)
    run = start_run(config, {"autoencoding": Autoencoding(vae, config.colour_map == "fitted")})
    rng = random.Random(config.run.seed + 7919 * run.progress.step + run.accelerator.process_index)
    crops = Crops(config, rng, run.accelerator.device)
    held = crops.draw(8, config.size)
    named = named_colours(config.style).to(run.accelerator.device) if config.flat_batch else None
    sampled = 0.0
    for _ in run.steps():
        pixels = crops.draw(config.run.batch_size, config.crop)
        noise = torch.randn(len(pixels), 4, config.crop // 8, config.crop // 8, device=pixels.device)
        noise *= config.latent_noise * torch.rand(1).item()
        flat = None if named is None else Flat.draw(config.flat_batch, named, rng)
        with run.accelerator.autocast():
            latents, output, colour, moved = run.modules["autoencoding"](pixels, noise, flat)
        pull = far_from_standard(latents)
        restored = reconstruction_loss(output, pixels, config.edge_weight)
        loss = restored + config.latent_weight * pull + config.colour_weight_at(run.fraction) * colour
        loss = loss + config.flat_weight * moved
        run.update(loss, restored=restored, pull=pull, colour=colour, flat=moved)
        if run.progress.seconds - sampled > 60 * config.run.sample_minutes:
            sampled = run.progress.seconds
            _sample(run, vae, held)
    _sample(run, vae, held)
    with run.averaged(), run.writing("the autoencoder"):
        if run.accelerator.is_main_process:
            vae.to(memory_format=torch.contiguous_format).save_pretrained(run.folder / "vae")
    return run.folder / "vae"


class Crops:
    """Random pieces of random scenes of the configured styles."""

    def __init__(self, config: VaeConfig, rng: random.Random, device: torch.device):
        emojis = load_metadata("wide")
        pictures = [load_pictures(s, emojis, config.size) for s in (config.style, *config.extra_styles)]
        self.styles = [(p, [e for e in emojis if e.code in p]) for p in pictures]
        self.rng, self.size, self.device = rng, config.size, device

    def draw(self, count: int, crop: int) -> torch.Tensor:
        """[count, 3, crop, crop] in -1..1."""
        images = []
        for _ in range(count):
            drawings, known = self.rng.choice(self.styles)
            image = render_scene(random_scene(known, self.rng), drawings, self.size)
            x, y = (self.rng.randint(0, self.size - crop) for _ in range(2))
            images.append(image.crop((x, y, x + crop, y + crop)))
        return to_tensor(images).to(self.device, memory_format=torch.channels_last)


@torch.no_grad()
def _sample(run: TrainingRun, vae: AutoencoderTiny, pixels: torch.Tensor) -> None:
    """Say and show how the averaged weights restore ``pixels``, and how many flat colours they turn into another."""
    if not run.accelerator.is_main_process:
        return
    with run.averaged():
        latents = vae.encoder(pixels)
        output = vae.decoder(latents)
        colours = measure(vae)
    psnr = -10 * ((output.clamp(-1, 1) - pixels) / 2).square().mean().log10().item()
    run.say(f"step {run.progress.step}: PSNR {psnr:.2f} dB, latent std {latents.std((0, 2, 3)).tolist()}")
    run.say(in_a_line(colours))
    sheet = run.folder / "samples" / f"{run.progress.step:06d}.png"
    with run.writing("samples", needed=False):
        save_grid(to_images(torch.cat([pixels, output])), len(pixels), sheet, row_labels=("picture", "restored"))
