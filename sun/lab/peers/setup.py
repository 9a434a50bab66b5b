"""What the trainers of the peers share: the frozen model, pictures with captions, pictures to look at, a card."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...common.settings import ConfigError, last_name
from ...pictures.png import save_grid, to_images
from ...training.algorithm import NoiseSchedule
from ...training.card import name_of, write_table_card
from ...training.config import DTYPES, RunConfig
from ...training.data.sources import Source, source_of
from ...training.models import encoder_of, latent_shape, use_fast_attention
from ...training.previews import sample_prompts
from ...training.run import TrainingRun


@dataclass
class PeerConfig:
    """The settings every peer has; those of ``SunTrainConfig`` that bear their names."""

    run: RunConfig = field(default_factory=RunConfig)
    model: str = "emoji"
    data: str = "emoji:twemoji"
    allow_commands: bool = field(default=False, metadata={"typed": True})
    cache: str = ""
    workers: int = 0
    resolution: int = 0  # 0: the model's own
    guidance_scale: float = 8.0
    empty_captions: float = 0.0
    pure_noise_at_start: bool = False  # x_999 is pure noise, as at inference, instead of noised data
    gradient_checkpointing: bool = False


@dataclass
class Batch:
    """Latents [B, 4, h, w] in model units, text states of their captions and of the empty prompt [B, L, D]."""

    x0: Tensor
    positive: Tensor
    empty: Tensor


class Distillation:
    """A frozen model and its data, on the device of a run. What is random comes from the run's own generators."""

    def __init__(self, config: PeerConfig, pipe: Any, run: TrainingRun) -> None:
        if run.sharded:
            raise ConfigError(
                "FSDP needs equal U-Net calls on all processes, which this training does not make. Launch with DDP."
            )
        self.config, self.pipe, self.run = config, pipe, run
        self.device = run.accelerator.device
        pipe.vae.to(self.device)
        run.place(pipe.text_encoder)
        pipe.unet.to(self.device)
        use_fast_attention(pipe.unet, self.device)
        run.calls.watch(pipe.unet)
        for parameter in pipe.unet.parameters():
            if not parameter.requires_grad:  # a LoRA on it stays in float32
                parameter.data = parameter.data.to(DTYPES[config.run.frozen])
        self.schedule = NoiseSchedule(pipe.scheduler.alphas_cumprod).to(self.device)
        self.encode, self.shape = encoder_of(pipe), latent_shape(pipe, config.resolution)
        self.source: Source = source_of(config, pipe, run)

    @property
    def total(self) -> int:
        """T, the number of timesteps of the noise schedule."""
        return self.schedule.num_train_timesteps

    @torch.no_grad()
    def batch(self) -> Batch:
        """New pictures; a share ``empty_captions`` of them without its caption."""
        x0, captions = self.source(self.config.run.batch_size)
        captions = ["" if self.run.rng.random() < self.config.empty_captions else c for c in captions]
        positive = self.source.encoder(self.encode)(captions)
        return Batch(x0, positive, self.encode([""]).expand_as(positive))

    @torch.no_grad()
    def sample_grid(self, unet: Any, scheduler: Any, steps: int = 4) -> None:
        """``steps`` steps of the averaged weights without guidance, as a PNG in the run's folder ``samples``.

        ``unet`` (x, t, text states) predicts noise. Seeds torch, which the run does anew at every step.
        """
        if not self.run.accelerator.is_main_process:
            return
        prompts, _ = sample_prompts(self.config.model, self.config.data)
        positive = self.encode(prompts)
        torch.manual_seed(0)
        with self.run.averaged(), self.run.accelerator.autocast():
            x = torch.randn(len(prompts), *self.shape).to(self.device)
            scheduler.set_timesteps(steps, device=self.device)
            for t in scheduler.timesteps:
                predicted = unet(x, t.expand(len(x)), positive).float()
                x = scheduler.step(predicted, t, x, return_dict=False)[0]
            pixels = self.pipe.vae.decode(x / self.pipe.vae.config.scaling_factor).sample
        path = self.run.folder / "samples" / f"{self.run.progress.step:06d}.png"
        with self.run.writing("samples", needed=False):
            save_grid(to_images(pixels), len(prompts), path)
        self.run.say(f"step {self.run.progress.step}: {self.run.average_losses()}")

    def write_card(self, title: str, usage: str, facts: dict[str, Any]) -> None:
        """Write ``README.md`` and ``training.json`` beside the weights: what they are and how they were made."""
        config = self.config
        rows = {
            "base model": name_of(config.model),
            **facts,
            "data": last_name(config.data),
            "guidance scale w": config.guidance_scale,
        }
        write_table_card(self.run, config, title, facts, rows, usage)
