"""What is trained on scenes from a model that is there: fine-tunes, and small additions to its frozen weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from ...shipped import EMOJI_GUIDANCE
from ...training.config import RunConfig
from ...training.models import load_frozen, use_fast_attention
from ...training.run import TrainingRun, start_run
from .base import Batch, Losses, SceneConfig, denoising_loss, train_on_scenes
from .runs import emoji_run
from .scenes import Scene
from .sources import check_style


@dataclass
class AdditionConfig(SceneConfig):
    """A change of low ``rank`` to the frozen ``model``. Without ``stages`` it trains at the model's own size."""

    run: RunConfig = field(default_factory=lambda: emoji_run("", 1000, 1e-3))
    stages: tuple[tuple[int, float], ...] = ()
    sample_guidance: float = EMOJI_GUIDANCE
    model: str = "emoji"
    rank: int = 16


def load_start(config: SceneConfig, model: str) -> StableDiffusionPipeline:
    """The frozen pipeline to start from; fills in ``config.stages``. Raises ConfigError."""
    check_style(config.style)
    pipe = load_frozen(model)
    config.stages = config.stages or ((pipe.unet.config.sample_size * 8, 1.0),)
    return pipe


def styles_of(config: SceneConfig) -> tuple[str, ...]:
    """The styles whose pictures are in the weights: the base's and the new one."""
    return tuple(dict.fromkeys(("twemoji", config.style)))


class ShownScenes(Protocol):
    """The scenes of one picture size, their latents [N, 4, h, w], and what else of each is shown to the model."""

    scenes: list[Scene]
    latents: Tensor

    def condition(self, numbers: list[int]) -> Tensor:
        """[B, ...]: what is shown with the scenes of these numbers."""
        ...


Predict = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(trained module, x_t [B, 4, h, w], t [B], text states [B, L, D], condition [B, ...]) -> predicted noise."""


def train_conditioned(
    config: AdditionConfig,
    pipe: StableDiffusionPipeline,
    name: str,
    module: nn.Module,
    shown: Callable[[int], ShownScenes],
    predict: Predict,
    write: Callable[[Any], object],
) -> TrainingRun:
    """Train ``module`` beside the frozen ``pipe`` to denoise scenes it is shown more of than their captions tell.

    name: the module's in the checkpoints. shown: makes the scenes of a picture size in pixels. write: takes the module
    with its averaged weights, on one process, at intervals and at the end.
    """
    run = start_run(config, {name: module.train()})
    device = run.accelerator.device
    use_fast_attention(module, device)
    pipe.vae.to(device)
    with run.accelerator.main_process_first():  # the others then read what it wrote
        sizes = {size: shown(size) for size, _ in config.stages}

    def loss_of(batch: Batch) -> Losses:
        condition = sizes[batch.size].condition(batch.numbers).to(device)

        def predict_noise(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return predict(run.modules[name], x_t, t, context, condition)

        return denoising_loss(config, run, pipe, batch, predict_noise)

    def save(size: int) -> None:
        save_averaged(run, lambda: write(run.unwrapped(name)))

    train_on_scenes(config, run, pipe, save, loss_of, lambda size: (sizes[size].scenes, sizes[size].latents))
    return run


def save_averaged(run: TrainingRun, write: Callable[[], object]) -> None:
    """Call ``write`` on one process while the trained modules hold their averaged weights; say how far the run is."""
    with run.averaged():
        if run.accelerator.is_main_process:
            write()
    run.say(f"step {run.progress.step}: {run.average_losses()}")
