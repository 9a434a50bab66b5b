"""Train the text encoder and the U-Net of Emoji Diffusion on latents of random scenes.

Scenes are rendered and encoded once per stage; their captions are written anew each time a scene is drawn.
Training goes from small pictures to full size (``BaseConfig.stages``), as Stable Diffusion itself did.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ...pictures.png import save_grid
from ...pipelines.loading import load_part, load_text_encoder, load_unet
from ...pipelines.schedulers import make_scheduler
from ...pipelines.text import encode_texts
from ...shipped import EMOJI_GUIDANCE
from ...training.card import EMOJI_NAME, put_name
from ...training.config import RunConfig
from ...training.models import use_fast_attention
from ...training.run import TrainingRun, start_run
from .latents import encode_scenes
from .runs import emoji_run
from .scenes import Scene, caption_of
from .sources import Emoji, check_style, load_metadata
from .text_pretraining import pretrain_text
from .tokenizer import build_tokenizer

# Combinations of emoji and attributes that the training scenes are very unlikely to contain.
SAMPLE_STEPS = 25
SAMPLE_PROMPTS = (
    "large polar bear, yellow background",
    "snake, purple background",
    "small red apple, on the left, green background",
    "pizza, blue background",
    "ghost, orange background",
    "rocket, black background",
    "soccer ball and dog face, pink background",
    "guitar, cyan background",
    "large cactus, brown background",
    "cat face next to fish, gray background",
    "small rocket, at the top, yellow background",
    "smiling face with sunglasses, green background",
    "frog face, red background",
    "bicycle, white background",
    "bouquet, black background",
    "small crab, at the bottom, blue background",
    "large tomato, white background",
    "owl, pink background",
    "mushroom and red apple, white background",
    "hammer, purple background",
    "large red heart, cyan background",
    "cloud with rain, gray background",
    "hot beverage, mirrored, yellow background",
    "octopus, on the right, orange background",
)


@dataclass
class SceneConfig:
    """Denoising of rendered scenes: what the base model, its fine-tunes and its LoRAs have in common.

    ``stages`` are (picture size, share of the run) in order; ``scenes`` are rendered for each stage.
    """

    run: RunConfig = field(default_factory=RunConfig)
    style: str = "twemoji"
    emojis: str = "everyday"  # or "wide", "all": see sources.load_metadata
    stages: tuple[tuple[int, float], ...] = ((128, 1.0),)
    scenes: int = 10000
    empty_captions: float = 0.1
    snr_gamma: float = 5.0
    clean_weight: float = 0.25  # weight of the clean picture's error at every noise level, on top of min-SNR
    offset_noise: float = 0.1
    sample_guidance: float = EMOJI_GUIDANCE


@dataclass
class BaseConfig(SceneConfig):
    """New models of the sizes below, or those of ``init_model``."""

    run: RunConfig = field(
        default_factory=lambda: emoji_run(
            "runs/emoji-base", 6000, 8e-4, batch_size=64, warmup_steps=100, ema_decay=0.999
        )
    )
    stages: tuple[tuple[int, float], ...] = ((64, 0.35), (128, 0.65))
    vae: str = "runs/emoji-vae/vae"
    init_model: str = ""  # a diffusers folder to go on from: its text encoder, tokenizer and U-Net
    channels: tuple[int, ...] = (64, 128, 128, 64)
    heads: int = 4
    text_width: int = 128
    text_layers: int = 4
    vocabulary: int = 2048
    text_steps: int = 900  # of pretraining the text encoder, before the first step of the run
    text_batch: int = 64
    train_text: bool = True  # together with the U-Net; without, a step costs a fifth less


def build_text_encoder(config: BaseConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            projection_dim=config.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(config: BaseConfig) -> UNet2DConditionModel:
    """SD 1.5's topology (4 stages, 2 layers each, 16 cross-attention layers), narrow."""
    return UNet2DConditionModel(
        sample_size=config.stages[-1][0] // 8,
        block_out_channels=config.channels,
        cross_attention_dim=config.text_width,
        attention_head_dim=config.heads,
    )


def build_models(
    config: BaseConfig, emojis: list[Emoji], folder: Path
) -> tuple[CLIPTokenizer, CLIPTextModel, UNet2DConditionModel]:
    """New models of the configured size, or those of ``config.init_model`` in fp32."""
    if config.init_model:
        source = Path(config.init_model)
        return (
            CLIPTokenizer.from_pretrained(source / "tokenizer"),
            load_text_encoder(source / "text_encoder"),
            load_unet(source, torch.float32),
        )
    with PartialState().main_process_first():  # its files are written and read back
        tokenizer = build_tokenizer(emojis, config.vocabulary, folder / "tokenizer")
    return tokenizer, build_text_encoder(config, tokenizer), build_unet(config)


def sd15_scheduler() -> DDIMScheduler:
    """SD 1.5's noise schedule and scheduler settings."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def train_base(config: BaseConfig) -> Path:
    """Train, and write ``<output>/model`` (a StableDiffusionPipeline folder); returns that folder."""
    check_style(config.style)
    vae = load_part(AutoencoderTiny, Path(config.vae), torch.float32).requires_grad_(False)
    torch.manual_seed(config.run.seed)
    emojis, folder = load_metadata(config.emojis), Path(config.run.output)
    tokenizer, text_encoder, unet = build_models(config, emojis, folder)
    if config.text_steps and not config.init_model:
        text_encoder = pretrained_text(config, folder / "text_encoder", vae, emojis, tokenizer, text_encoder)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=sd15_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    trained: dict[str, torch.nn.Module] = {"unet": unet}
    if config.train_text:
        trained["text_encoder"] = text_encoder
    else:
        text_encoder.requires_grad_(False)
    run = start_run(config, trained)
    train_on_scenes(config, run, pipe, lambda size: save_base(config, run, pipe, size))
    if run.accelerator.is_main_process:
        put_name(run.folder / "model", EMOJI_NAME)
    return run.folder / "model"


def pretrained_text(
    config: BaseConfig, folder: Path, vae: Any, emojis: list[Emoji], tokenizer: CLIPTokenizer, untrained: CLIPTextModel
) -> CLIPTextModel:
    """The text encoder, pretrained once and kept in ``folder``: every process and every resumed run has the same."""
    with PartialState().main_process_first():
        if not config.run.resume and PartialState().is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        if not (folder / "config.json").is_file():
            scenes, latents = encode_scenes(
                vae, emojis, config.style, config.stages[0][0], config.scenes, config.run.seed
            )
            pretrain_text(tokenizer, untrained, scenes, latents, config.text_steps, config.text_batch, config.run.seed)
            unfinished = folder.with_name(f"{folder.name}.new")
            untrained.save_pretrained(unfinished)
            unfinished.rename(folder)
    return load_text_encoder(folder)


class Batch(NamedTuple):
    """What one step trains on: numbers of the scenes in their stage, the scenes, their latents and their captions."""

    numbers: list[int]
    scenes: list[Scene]
    latents: torch.Tensor
    captions: list[str]
    size: int


Losses = tuple[torch.Tensor, torch.Tensor]


def train_on_scenes(
    config: SceneConfig,
    run: TrainingRun,
    pipe: StableDiffusionPipeline,
    save: Callable[[int], object],
    loss_of: Callable[[Batch], Losses] | None = None,
    encoded: Callable[[int], tuple[list[Scene], torch.Tensor]] | None = None,
) -> None:
    """Denoise scenes of ``config.style`` until ``run`` ends: the U-Net, and the text encoder if ``run`` trains it.

    ``save(size)``, with the picture size of the moment in pixels, is called at intervals and at the end.
    ``loss_of`` computes a batch's :func:`denoising_loss` where something else than the U-Net alone predicts the noise.
    ``encoded`` gives other scenes and latents than those of the style for a picture size.
    """
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.to(run.accelerator.device)
    use_fast_attention(pipe.unet, run.accelerator.device)
    stage_ends = [sum(s for _, s in config.stages[: i + 1]) for i in range(len(config.stages))]
    rng = run.rng
    stage, latents = -1, torch.empty(0)
    scenes: list[Scene] = []
    sampled = run.progress.seconds
    for _ in run.steps():
        now = next((i for i, end in enumerate(stage_ends) if run.fraction < end), len(stage_ends) - 1)
        if now != stage:
            stage = now
            size = config.stages[stage][0]
            with run.preparing(), run.accelerator.main_process_first():  # the others then read what it wrote
                if encoded:
                    scenes, latents = encoded(size)
                else:
                    emojis = load_metadata(config.emojis)
                    scenes, latents = encode_scenes(
                        pipe.vae, emojis, config.style, size, config.scenes, config.run.seed
                    )
            run.say(f"stage {stage}: {size} px, {len(scenes)} scenes, latent std {latents.std((0, 2, 3)).tolist()}")
        picked = [rng.randrange(len(scenes)) for _ in range(config.run.batch_size)]
        captions = ["" if rng.random() < config.empty_captions else caption_of(scenes[i], rng) for i in picked]
        batch = Batch(picked, [scenes[i] for i in picked], latents[picked], captions, config.stages[stage][0])
        loss, plain = loss_of(batch) if loss_of else denoising_loss(config, run, pipe, batch)
        run.update(loss, mse=plain)
        if run.progress.seconds - sampled > 60 * config.run.sample_minutes:
            sampled = run.progress.seconds
            save(config.stages[stage][0])
    save(config.stages[-1][0])


def denoising_loss(
    config: SceneConfig,
    run: TrainingRun,
    pipe: StableDiffusionPipeline,
    batch: Batch,
    predict: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Losses:
    """(weighted loss, plain MSE) of the noise predicted for one batch of latents [B, 4, h, w].

    ``predict(x_t, t, context)`` gives the noise; without it the U-Net alone does.
    """
    device = run.accelerator.device
    # The run's modules, where it trains them: with several processes those average the gradients.
    unet = run.modules.get("unet", pipe.unet)
    text_encoder = run.modules.get("text_encoder", pipe.text_encoder)
    x0 = batch.latents.to(device)
    # A shared offset per channel hides the picture's mean at the noisiest steps; plain noise cannot, and the
    # model would then read the background colour from x_T instead of from the caption.
    noise = torch.randn_like(x0) + config.offset_noise * torch.randn(*x0.shape[:2], 1, 1, device=device)
    abar = pipe.scheduler.alphas_cumprod.to(device)
    t = torch.randint(0, len(abar), (len(x0),), device=device)
    a = abar[t].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    with run.accelerator.autocast():
        context = encode_texts(pipe.tokenizer, text_encoder, batch.captions)
        predicted = (predict(x_t, t, context) if predict else unet(x_t, t, context).sample).float()
    per_image = F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))
    snr = a.flatten() / (1 - a.flatten())
    # Min-SNR leaves the noisiest steps, where it is decided what the picture shows, a weight near zero in x0.
    weight = ((snr.clamp(max=config.snr_gamma) if config.snr_gamma else snr) + config.clean_weight) / snr
    return (weight * per_image).mean(), per_image.mean().detach()


def save_base(config: SceneConfig, run: TrainingRun, pipe: StableDiffusionPipeline, size: int) -> Path:
    """Write the pipeline with the averaged weights, and a grid of ``SAMPLE_PROMPTS`` in ``size`` pixels."""
    with run.averaged():
        if run.accelerator.is_main_process:
            pipe.save_pretrained(run.folder / "model")
            save_samples(config, run, pipe, size)
    run.say(f"step {run.progress.step}: {run.average_losses()}")
    return run.folder / "model"


def save_samples(config: SceneConfig, run: TrainingRun, pipe: StableDiffusionPipeline, size: int) -> None:
    """Write a grid of ``SAMPLE_PROMPTS`` drawn with the weights of the moment."""
    with run.accelerator.autocast():
        images = sample_images(pipe, config.sample_guidance, size=size)
    save_grid(images, 8, run.folder / "samples" / f"{run.progress.step:06d}.png")


@torch.no_grad()
def sample_images(
    pipe: StableDiffusionPipeline, guidance_scale: float, seed: int = 0, size: int | None = None
) -> list[Image.Image]:
    """DPM-Solver++ pictures of ``SAMPLE_PROMPTS`` in 25 steps; picture i from seed + i, the model's size by default."""
    plain = pipe.scheduler
    pipe.scheduler = make_scheduler("dpmpp_2m", plain.config)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(SAMPLE_PROMPTS))]
    try:
        return pipe(
            list(SAMPLE_PROMPTS),
            num_inference_steps=SAMPLE_STEPS,
            guidance_scale=guidance_scale,
            generator=generators,
            height=size,
            width=size,
        ).images
    finally:
        pipe.scheduler = plain
