"""Train a SUN adapter on a frozen diffusers-format SD 1.x model (Algorithm 1; equations in ``algorithm.py``).

Only the adapter trains. The U-Net runs as teacher (no SUN, classifier-free guidance) and as student (SUN, one call).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..adapter import SunAdapter
from ..common.settings import ConfigError
from ..pipelines.attach import attach, detach
from .algorithm import NoiseSchedule
from .config import SunTrainConfig, check_settings
from .data.negative_phrases import NegativePrompts
from .data.sources import source_of
from .models import FrozenModels, encoder_of, latent_shape, load_frozen, use_fast_attention
from .previews import sample_prompts, save_previews
from .run import TrainingRun, start_run
from .student import Student, Teacher, describe_training, make_adapter
from .targets import Prompts, make_objective
from .virtual import virtual_fine_tunes

REFERENCE_STEPS = 25  # of the row above SUN's in the pictures that are drawn while training


def train_sun(config: SunTrainConfig) -> Path:
    """Train and write ``<output>/adapter.safetensors`` with its settings in the header; returns the file.

    Raises ConfigError, DataError or SunFileError before training, NonFiniteLoss and OSError while it goes on.
    """
    # settings and models
    check_settings(config)
    pipe = load_frozen(config.model)
    unet = pipe.unet
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    adapter = make_adapter(config, unet)
    earlier = adapter.info.training

    # the run: device, optimiser, checkpoint to go on from
    run = start_run(config, {"student": Student(unet, adapter)})
    if run.sharded:
        raise ConfigError(
            "SUN trains 38 million parameters: FSDP has nothing to share out, and its U-Net calls differ between "
            "processes. Launch without FSDP (DDP)."
        )
    pipe.vae.to(run.accelerator.device)
    run.place(unet, pipe.text_encoder)
    use_fast_attention(unet, run.accelerator.device)
    run.calls.watch(unet)
    models = FrozenModels(unet, config.fine_tunes, partial(virtual_fine_tunes, config))
    attach(unet, adapter)

    # data, and what a step aims at
    objectives = make_objectives(config, run, pipe, len(models))

    # the loop
    for step in run.steps():
        turn = models.turn(step, config.target_reuse)
        models.use(turn)
        with run.accelerator.autocast():
            losses = objectives[turn].losses(step)
        run.update(losses.pop("total"), **losses)
        models.use(0)  # not before: the backward pass needs the weights of the forward pass
        if run.time_to_sample():
            save_adapter(config, run, adapter, earlier, needed=False)
            sample_grid(config, run, pipe)

    # the result
    path = save_adapter(config, run, adapter, earlier)
    sample_grid(config, run, pipe)
    detach(unet)
    return path


def make_objectives(config: SunTrainConfig, run: TrainingRun, pipe: Any, count: int) -> list[Any]:
    """One objective for each of ``count`` models that take turns; they share the data and the trajectories."""
    source, encode = source_of(config, pipe, run), encoder_of(pipe)
    negatives = NegativePrompts.load(
        config.negatives, config.data, config.max_negative_phrases, config.empty_negative_probability
    )
    prompts = Prompts(source, negatives, run.rng, source.encoder(encode), config.empty_captions, config.run.batch_size)
    schedule = NoiseSchedule(pipe.scheduler.alphas_cumprod).to(run.accelerator.device)
    teacher, shape = Teacher(pipe.unet, config.guidance_scale), latent_shape(pipe, config.resolution)
    shared = replace(config, bank_size=max(1, config.bank_size // count))
    return [
        make_objective(shared, run, prompts, teacher, schedule, pipe.scheduler.config, shape, str(i or ""))
        for i in range(count)
    ]


def save_adapter(
    config: SunTrainConfig,
    run: TrainingRun,
    adapter: SunAdapter,
    earlier: dict[str, Any] | None = None,
    needed: bool = True,
) -> Path:
    """Write the averaged adapter in fp16; see :func:`describe_training`. Without room, raises OSError if ``needed``."""
    describe_training(config, run, adapter, earlier)
    path = run.folder / "adapter.safetensors"
    if run.accelerator.is_main_process:
        with run.averaged(), run.writing("adapter.safetensors", needed):
            adapter.save(path, dtype=torch.float16)
    return path


def sample_grid(config: SunTrainConfig, run: TrainingRun, pipe: Any) -> None:
    """Reference row (25 steps, CFG) over SUN row (4 steps), as a PNG beside the checkpoint."""
    teacher, student = Teacher(pipe.unet, config.guidance_scale), run.unwrapped("student")
    rows = [(teacher, "dpmpp_2m", REFERENCE_STEPS), (student, "ddim", 4)]
    save_previews(run, pipe, sample_prompts(config.model, config.data), rows, pipe.unet.config.sample_size)
