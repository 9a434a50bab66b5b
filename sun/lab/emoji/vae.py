"""Train the AutoencoderTiny (TAESD layout: 8x, 4 latent channels) of Emoji Diffusion."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from PIL import Image

from ...pictures.png import save_grid, to_images
from ...pipelines.loading import load_part
from ...training.config import RunConfig
from ...training.run import TrainingRun, start_run
from .scenes import random_scene, render_scene
from .sources import load_metadata, load_pictures


@dataclass
class VaeConfig:
    """Crops of ``crop`` pixels are cut from scenes of ``size`` pixels."""

    run: RunConfig = field(
        default_factory=lambda: RunConfig(
            output="runs/emoji-vae", steps=4000, batch_size=32, lr=2e-3, lr_schedule="cosine", warmup_steps=50,
            weight_decay=0.0, betas=(0.9, 0.99), ema_decay=0.99,
        )
    )  # fmt: skip
    style: str = "twemoji"
    extra_styles: tuple[str, ...] = ()
    init_vae: str = ""  # a diffusers folder to go on from
    freeze_encoder: bool = False  # train the decoder alone: latents, and whatever was trained on them, stay valid
    size: int = 128
    crop: int = 64
    edge_weight: float = 0.5
    latent_noise: float = 0.1
    latent_weight: float = 0.05


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


class Autoencoding(torch.nn.Module):
    """One training pass through the autoencoder as one module, so that several processes average its gradients."""

    def __init__(self, vae: AutoencoderTiny):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels [B, 3, H, W], noise [B, 4, H/8, W/8] added to the latents -> (latents, restored pixels), fp32."""
        latents = self.vae.encoder(pixels).float()
        restored = self.vae.decoder((latents + noise).contiguous(memory_format=torch.channels_last))
        return latents, restored.float()


def train_vae(config: VaeConfig) -> Path:
    """Train, write ``<output>/vae`` (diffusers folder) and sample grids; returns the folder."""
    emojis = load_metadata("wide")
    pictures = [load_pictures(s, emojis, config.size) for s in (config.style, *config.extra_styles)]
    styles = [(p, [e for e in emojis if e.code in p]) for p in pictures]
    vae = load_part(AutoencoderTiny, Path(config.init_vae), torch.float32) if config.init_vae else AutoencoderTiny()
    vae.to(memory_format=torch.channels_last)
    vae.encoder.requires_grad_(not config.freeze_encoder)
    run = start_run(config, {"autoencoding": Autoencoding(vae)})
    rng = random.Random(config.run.seed + 7919 * run.progress.step + run.accelerator.process_index)

    def draw(count: int, crop: int) -> torch.Tensor:
        images = []
        for _ in range(count):
            drawings, known = rng.choice(styles)
            image = render_scene(random_scene(known, rng), drawings, config.size)
            x, y = (rng.randint(0, config.size - crop) for _ in range(2))
            images.append(image.crop((x, y, x + crop, y + crop)))
        return to_tensor(images).to(run.accelerator.device, memory_format=torch.channels_last)

    held = draw(8, config.size)
    sampled = 0.0
    for _ in run.steps():
        pixels = draw(config.run.batch_size, config.crop)
        noise = torch.randn(len(pixels), 4, config.crop // 8, config.crop // 8, device=pixels.device)
        noise *= config.latent_noise * torch.rand(1).item()
        with run.accelerator.autocast():
            latents, output = run.modules["autoencoding"](pixels, noise)
        pull = latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()
        restored = reconstruction_loss(output, pixels, config.edge_weight)
        run.update(restored + config.latent_weight * pull, restored=restored, pull=pull)
        if run.progress.seconds - sampled > 60 * config.run.sample_minutes:
            sampled = run.progress.seconds
            _sample(run, vae, held)
    _sample(run, vae, held)
    with run.averaged():
        if run.accelerator.is_main_process:
            vae.to(memory_format=torch.contiguous_format).save_pretrained(run.folder / "vae")
    return run.folder / "vae"


@torch.no_grad()
def _sample(run: TrainingRun, vae: AutoencoderTiny, pixels: torch.Tensor) -> None:
    if not run.accelerator.is_main_process:
        return
    with run.averaged():
        latents = vae.encoder(pixels)
        output = vae.decoder(latents)
    psnr = -10 * ((output.clamp(-1, 1) - pixels) / 2).square().mean().log10().item()
    run.say(f"step {run.progress.step}: PSNR {psnr:.2f} dB, latent std {latents.std((0, 2, 3)).tolist()}")
    sheet = run.folder / "samples" / f"{run.progress.step:06d}.png"
    save_grid(to_images(torch.cat([pixels, output])), len(pixels), sheet, row_labels=("picture", "restored"))
