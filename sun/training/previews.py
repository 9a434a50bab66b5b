"""Pictures to look at while a training goes on: every few minutes some prompts, by each model from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.worlds import EMOJI, find, world_of
from ..pictures.png import save_grid, to_images
from ..pipelines.schedulers import make_scheduler
from .models import encoder_of
from .run import TrainingRun

Predict = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x [B, 4, h, w], t [B], positive and negative text states [B, L, D]) -> predicted noise."""


def sample_prompts(model: str, data: str) -> tuple[list[str], list[str]]:
    """(prompts, negatives) that a model trained on ``data`` should know."""
    if EMOJI in (world_of(model), world_of(data)):
        prompts, negatives = find(EMOJI, "samples")
        return list(prompts), list(negatives)
    prompts = ["a photo of a cat", "a castle on a hill, oil painting", "portrait of an old man", "a bowl of fruit"]
    return prompts, ["", "blurry", "", "low quality"]


@torch.no_grad()
def save_previews(
    run: TrainingRun,
    pipe: Any,
    texts: tuple[list[str], list[str]],
    rows: Sequence[tuple[Predict, str, int]],
    side: int,
) -> None:
    """Draw a row of pictures by each of ``rows`` with the averaged weights, as a PNG in the run's folder ``samples``.

    texts: prompts and negatives. rows: (who predicts the noise, solver, steps). side: of the latents.
    """
    if not run.accelerator.is_main_process:
        return
    device, count = run.accelerator.device, len(texts[0])
    positive, negative = map(encoder_of(pipe), texts)
    noise = torch.randn(count, pipe.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    images = []
    with run.averaged(), run.accelerator.autocast():
        for predict, solver, steps in rows:
            x, scheduler = noise.to(device), make_scheduler(solver, pipe.scheduler.config)
            scheduler.set_timesteps(steps, device=device)
            for t in scheduler.timesteps:
                predicted = predict(x, t.expand(count), positive, negative)
                x = scheduler.step(predicted, t, x, return_dict=False)[0]
            images += to_images(pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample)
    with run.writing("samples", needed=False):
        save_grid(images, count, run.folder / "samples" / f"{run.progress.step:06d}.png")
    run.say(f"step {run.progress.step}: {run.average_losses()}")
