"""Memory and speed of SUN training on the device that is there: the step of ``train_sun`` on random pictures."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from ...common.devices import device_name, synchronize
from ...common.settings import ConfigError
from ...pipelines.attach import attach, detach
from ..algorithm import NoiseSchedule, stage_targets
from ..config import SunTrainConfig
from ..models import load_frozen
from ..run import TrainingRun
from ..student import Student, Teacher, make_adapter
from ..targets import draw_guidance, draw_timesteps, rows_of, start_timesteps, sun_losses

GIB = 2**30


@dataclass
class Models:
    """The models a training process keeps in memory; ``alphas`` is the noise schedule."""

    unet: Any
    text_encoder: Any
    vae: Any
    alphas: Tensor


def random_sd15() -> Models:
    """Stable Diffusion 1.5's three models at full size, with random weights (no download)."""
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return Models(unet, CLIPTextModel(text), vae, torch.cumprod(1 - betas, 0))


def models_of(model: str) -> Models:
    """Those of a diffusers folder, or random ones of SD 1.5's size for ``sd15``."""
    if model == "sd15":
        return random_sd15()
    pipe = load_frozen(model)
    return Models(pipe.unet, pipe.text_encoder, pipe.vae, pipe.scheduler.alphas_cumprod)


def measure(config: SunTrainConfig, model: str = "sd15", updates: int = 5, warmup: int = 2) -> dict[str, Any]:
    """Run ``warmup`` + ``updates`` updates of a configuration here; returns the figures.

    ``seconds`` is the median of an update, ``pictures_per_second`` counts every process, ``memory_gib`` is the peak
    of one process: of the accelerator's memory, or of the process on a CPU.
    """
    parts = models_of(model)
    with tempfile.TemporaryDirectory(prefix="sun-benchmark-") as folder:
        # One step more than is run, so that the end of the run, which writes a checkpoint, is never reached.
        settings = replace(
            config.run, output=folder, steps=warmup + updates + 1, minutes=0.0, checkpoint_minutes=1e9, resume=False
        )
        step = TrainingStep(replace(config, run=settings), parts)
        run, device, times = step.run, step.run.accelerator.device, [time.monotonic()]
        for number in run.steps():
            if number > len(times) - 1:  # a new update has begun
                synchronize(device)
                times.append(time.monotonic())
                if number == warmup:
                    _reset_peak(device)
            if number == warmup + updates:
                break
            step()
        memory = _peak_gib(device)
        step.close()
    seconds = statistics.median(b - a for a, b in zip(times[warmup:], times[warmup + 1 :], strict=False))
    processes = run.accelerator.num_processes
    pictures = settings.batch_size * settings.accumulate * processes
    return {
        "measured": True,
        "device": device_name(device),
        "processes": processes,
        "pictures_per_update": pictures,
        "seconds": round(seconds, 4),
        "pictures_per_second": round(pictures / seconds, 4),
        "memory_gib": round(memory, 3),
        **settings_of(config, model, run.precision),
    }


class TrainingStep:
    """One micro-batch of ``train_sun`` on random data: teacher targets, student, losses, backward, update."""

    def __init__(self, config: SunTrainConfig, parts: Models):
        self.config, self.parts = config, parts
        freeze(config, parts)
        adapter = make_adapter(config, parts.unet)
        self.run = TrainingRun(config.run, {"student": Student(parts.unet, adapter)})
        device = self.run.accelerator.device
        self.run.place(parts.unet, parts.text_encoder)
        if not config.cache:
            parts.vae.to(device)
        attach(parts.unet, adapter)
        self.schedule = NoiseSchedule(parts.alphas).to(device)
        self.teacher = Teacher(parts.unet, config.guidance_scale)

    def __call__(self) -> None:
        run, config, schedule = self.run, self.config, self.schedule
        student, total = run.modules["student"], schedule.num_train_timesteps
        with run.accelerator.autocast():
            x, text = random_batch(config, self.parts, run.accelerator.device)
            positive, negative = text.chunk(2)
            t = draw_timesteps(config, len(x), total, run.rng)
            start = start_timesteps(config, t, total, run.rng)
            w = draw_guidance(config, len(x), run.rng).to(x.device)
            with torch.no_grad():
                targets = stage_targets(
                    x,
                    start.to(x.device),
                    t.to(x.device),
                    round(config.stage_length * total),
                    config.substeps,
                    lambda x, k, rows: self.teacher(x, k, positive[rows], negative[rows], rows_of(w, rows)),
                    lambda x, k, rows: student(x, k, positive[rows], negative[rows], rows_of(w, rows)),
                    schedule,
                )
            predicted = student(targets.x_t, targets.t, positive, negative, w if len(w) else None)
        cfg, msc = sun_losses(predicted, targets)
        run.update(config.cfg_weight * cfg + config.msc_weight * msc)

    def close(self) -> None:
        detach(self.parts.unet)


def random_batch(config: SunTrainConfig, parts: Models, device: torch.device) -> tuple[Tensor, Tensor]:
    """(latents [B, 4, h, w], text states [2 B, 77, D]); the text encoder and the autoencoder really run."""
    count, size = config.run.batch_size, latent_size(config, parts.unet)
    with torch.no_grad():
        x = torch.randn(count, 4, size, size, device=device)
        if not config.cache and isinstance(parts.vae, AutoencoderKL):
            parts.vae.encode(torch.randn(count, 3, size * 8, size * 8, device=device))
        length, words = parts.text_encoder.config.max_position_embeddings, parts.text_encoder.config.vocab_size
        text: Tensor = parts.text_encoder(torch.randint(0, words, (2 * count, length), device=device))[0]
    return x, text


def latent_size(config: SunTrainConfig, unet: Any) -> int:
    size = config.resolution // 8 if config.resolution else unet.config.sample_size
    if size < 1:
        raise ConfigError(f"resolution is the pictures' size in pixels, not {config.resolution}.")
    return int(size)


def freeze(config: SunTrainConfig, parts: Models) -> None:
    for module in (parts.unet, parts.vae, parts.text_encoder):
        module.requires_grad_(False).eval()
    if config.gradient_checkpointing:
        parts.unet.enable_gradient_checkpointing()
        parts.unet.train()


def settings_of(config: SunTrainConfig, model: str, precision: str) -> dict[str, Any]:
    names = ("batch_size", "accumulate", "optimizer", "frozen")
    run = {name: value for name, value in asdict(config.run).items() if name in names}
    return {
        "model": Path(model).name,
        **run,
        "precision": precision,
        "resolution": config.resolution,
        "substeps": config.substeps,
        "gradient_checkpointing": config.gradient_checkpointing,
        "cache": config.cache,
        "torch": torch.__version__,
    }


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_gib(device: torch.device) -> float:
    """Peak memory of this process: reserved by the allocator on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / GIB
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB
