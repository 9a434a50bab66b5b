"""Train a SUN adapter on a frozen diffusers-format SD 1.x model (Algorithm 1; equations in ``algorithm.py``).

Only the adapter trains. The U-Net runs as teacher (no SUN, classifier-free guidance) and as student (SUN, one call).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter import SunAdapter
from ..common.settings import ConfigError
from ..common.worlds import EMOJI, find, world_of
from ..pictures.png import save_grid, to_images
from ..pipelines.attach import attach, detach
from ..pipelines.latents import latent_scale
from ..pipelines.schedulers import make_scheduler
from ..pipelines.text import encode_texts
from .algorithm import NoiseSchedule
from .config import SunTrainConfig, check_settings
from .data.negative_phrases import NegativePrompts
from .data.sources import build_source
from .models import FrozenModels, load_frozen, use_fast_attention
from .run import TrainingRun, start_run
from .student import Student, Teacher, describe_training, make_adapter
from .targets import Prompts, make_objective

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
    models = FrozenModels(unet, config.fine_tunes)
    attach(unet, adapter)

    # data, and what a step aims at
    objectives = make_objectives(config, run, pipe, len(models))

    # the loop
    sampled = run.progress.seconds
    for step in run.steps():
        turn = models.turn(step, config.target_reuse)
        models.use(turn)
        with run.accelerator.autocast():
            losses = objectives[turn].losses(step)
        run.update(losses.pop("total"), **losses)
        models.use(0)  # not before: the backward pass needs the weights of the forward pass
        if run.progress.seconds - sampled > 60 * config.run.sample_minutes:
            sampled = run.progress.seconds
            save_adapter(config, run, adapter, earlier, needed=False)
            sample_grid(config, run, pipe)

    # the result
    path = save_adapter(config, run, adapter, earlier)
    sample_grid(config, run, pipe)
    detach(unet)
    return path


def make_objectives(config: SunTrainConfig, run: TrainingRun, pipe: Any, count: int) -> list[Any]:
    """One objective for each of ``count`` models that take turns; they share the data and the trajectories."""
    device, unet = run.accelerator.device, pipe.unet

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        return encode_texts(pipe.tokenizer, pipe.text_encoder, texts)

    scale = latent_scale(pipe.vae)
    resolution = config.resolution or unet.config.sample_size * scale
    source = run.track(
        "data",
        build_source(
            config.data,
            pipe.vae,
            resolution,
            run.rng,
            device,
            seed=config.run.seed,
            workers=config.workers,
            cache=config.cache,
            encode=encode,
            allow_commands=config.allow_commands,
        ),
    )
    negatives = NegativePrompts.load(
        config.negatives, config.data, config.max_negative_phrases, config.empty_negative_probability
    )
    prompts = Prompts(source, negatives, run.rng, source.encoder(encode), config.empty_captions, config.run.batch_size)
    schedule = NoiseSchedule(pipe.scheduler.alphas_cumprod).to(device)
    teacher = Teacher(unet, config.guidance_scale)
    shape = (unet.config.in_channels, resolution // scale, resolution // scale)
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


@torch.no_grad()
def sample_grid(config: SunTrainConfig, run: TrainingRun, pipe: Any) -> None:
    """Reference row (25 steps, CFG) over SUN row (4 steps), same noise, as a PNG beside the checkpoint."""
    if not run.accelerator.is_main_process:
        return
    unet, device = pipe.unet, run.accelerator.device
    prompts, negatives = sample_prompts(config)
    positive, negative = (encode_texts(pipe.tokenizer, pipe.text_encoder, texts) for texts in (prompts, negatives))
    side, count = unet.config.sample_size, unet.config.in_channels
    noise = torch.randn(len(prompts), count, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    teacher, student = Teacher(unet, config.guidance_scale), run.unwrapped("student")
    images = []
    with run.averaged(), run.accelerator.autocast():
        for predict, solver, steps in ((teacher, "dpmpp_2m", REFERENCE_STEPS), (student, "ddim", 4)):
            x, scheduler = noise, make_scheduler(solver, pipe.scheduler.config)
            scheduler.set_timesteps(steps, device=device)
            for t in scheduler.timesteps:
                predicted = predict(x, t.expand(len(x)), positive, negative)
                x = scheduler.step(predicted, t, x, return_dict=False)[0]
            images += to_images(pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample)
    with run.writing("samples", needed=False):
        save_grid(images, len(prompts), run.folder / "samples" / f"{run.progress.step:06d}.png")
    run.say(f"step {run.progress.step}: {run.average_losses()}")


def sample_prompts(config: SunTrainConfig) -> tuple[list[str], list[str]]:
    """(prompts, negatives) of the pictures that are drawn while training, to look at."""
    if EMOJI in (world_of(config.model), world_of(config.data)):
        prompts, negatives = find(EMOJI, "samples")
        return list(prompts), list(negatives)
    prompts = ["a photo of a cat", "a castle on a hill, oil painting", "portrait of an old man", "a bowl of fruit"]
    return prompts, ["", "blurry", "", "low quality"]
