"""Train a SUN adapter on a frozen diffusers-format SD 1.x model (Algorithm 1; equations in ``algorithm.py``).

Only the adapter trains. The U-Net runs as teacher (no SUN, classifier-free guidance) and as student (SUN, one call).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import SunAdapter
from ..common.settings import ConfigError, without_folders
from ..files import SunInfo
from ..pipelines.attach import attach, detach
from ..pipelines.text import encode_texts
from ..shipped import EMOJI_SUN
from ..surgery import from_unet, widen
from .algorithm import NoiseSchedule, guided_noise
from .cost.speed import use_fast_attention
from .data.negatives import NegativePrompts
from .data.samples import is_emoji
from .data.sources import build_source
from .models import FrozenModels, load_frozen
from .run import RunConfig, TrainingRun, describe_machine, start_run
from .targets import Prompts, make_objective


@dataclass
class SunTrainConfig:
    """Every symbol of Algorithm 1 as a setting, with the paper's value as default where the paper states one.

    Stated: ``guidance_scale`` w = 8, ``msc_weight`` lambda = 1, ``stage_length`` Delta = 0.25, ``replace_probability``
    p = 0.1, up to 100 negative phrases, 5,000 steps of 32 pictures, AdamW with lr 1e-4 and weight decay 0.01. Ours
    where it is silent: ``substeps`` N, the initialisation (K/V copied from the U-Net, ``init_alpha``),
    ``run.max_grad_norm`` 1.0, and the options from ``stage_start_probability`` down, which are off by default. The
    ``positive_branch`` is ours too: the authors' release has it, the paper has not.
    """

    run: RunConfig = field(default_factory=lambda: RunConfig(output="runs/sun", steps=5000, batch_size=32, lr=1e-4))
    model: str = "emoji"
    # Folders of fine-tunes of `model`: their U-Nets take turns with its own, `target_reuse` steps each, with its text
    # encoder, and share the `bank_size` trajectories. Each stays in memory.
    fine_tunes: tuple[str, ...] = ()
    data: str = "emoji:twemoji"
    cache: str = ""  # latents | latents+text: encode a folder's pictures (and captions) once, on disk
    workers: int = 0  # processes that decode webdataset shards, for each training process
    resolution: int = 0  # 0: the model's own
    negatives: str = "auto"  # auto | a text file, one phrase a line
    max_negative_phrases: int = 100
    empty_negative_probability: float = 0.05
    guidance_scale: float = 8.0
    guidance_range: tuple[float, float] = (0.0, 0.0)  # not 0: the adapter takes the scale; rows draw theirs from here
    cfg_weight: float = 1.0
    msc_weight: float = 1.0
    msc_error: str = "noise"  # "state": L_msc in the state that the stage ends in, where the noisy stages weigh more
    huber_c: float = 0.0  # above 0: errors of both losses are pseudo-Huber, linear from about there on
    stage_length: float = 0.25
    substeps: int = 6
    replace_probability: float = 0.1
    positive_branch: bool = True
    attention_normalization: bool = True
    init_alpha: float = 0.5
    init_adapter: str = ""  # a file to go on from, or "emoji" for the shipped one; its scale may be fixed
    empty_captions: float = 0.0
    stage_start_probability: float = 0.0  # share of timesteps drawn from 999, 749, 499, 249 instead of all
    pure_noise_at_start: bool = False  # x_999 is pure noise, as at inference, instead of noised data
    target_reuse: int = 1  # student updates per teacher batch, drawn from a short replay buffer
    gradient_checkpointing: bool = False
    trajectories: bool = False  # inputs are states of the teacher's guided trajectory from pure noise, not noised data
    teacher_solver: str = "dpmpp_2m"  # of trajectories: dpmpp_2m | ddim; Algorithm 1 steps with DDIM
    # Trajectories kept, in memory and in checkpoints (up to 3 MB each at 512 pixels); every `target_reuse`-th step adds
    # a batch of them.
    bank_size: int = 4096
    replace_depth: int = 1  # how many stages earlier the student may start whose state replaces the input
    rollout_probability: float = 0.0  # share of steps trained through all stages, on the distance of the last state


class Student(nn.Module):
    """The frozen U-Net with SUN as one trainable module: its parameters are the adapter's alone."""

    def __init__(self, unet: nn.Module, adapter: SunAdapter):
        super().__init__()
        self.adapter = adapter
        self._unet = (unet,)  # in a tuple: not registered, so never trained, saved or averaged

    def forward(self, x: Tensor, t: Tensor, positive: Tensor, negative: Tensor, w: Tensor | None = None) -> Tensor:
        """Predicted noise [B, 4, H, W] in one call; ``positive`` and ``negative`` are text states [B, L, D], ``w`` [B]
        guidance scales."""
        kwargs = {"sun_negative": negative, "sun_guidance": w}
        return self._unet[0](x, t, positive, cross_attention_kwargs=kwargs).sample.float()


class Teacher:
    """e_cfg of the frozen U-Net: both prompts in one batch of twice the size."""

    def __init__(self, unet: nn.Module, guidance_scale: float):
        self.unet, self.w = unet, guidance_scale

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, positive: Tensor, negative: Tensor, w: Tensor | None = None) -> Tensor:
        """``w`` [B]: guidance scales of the rows, else the teacher's own."""
        both = self.unet(torch.cat([x, x]), torch.cat([t, t]), torch.cat([positive, negative])).sample.float()
        e_positive, e_negative = both.chunk(2)
        return guided_noise(e_positive, e_negative, self.w if w is None else w)


def train_sun(config: SunTrainConfig) -> Path:
    """Train and write ``<output>/adapter.safetensors`` with its settings in the header; returns the file."""
    check_settings(config)
    pipe = load_frozen(config.model)
    unet, vae, text_encoder, tokenizer = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    adapter = make_adapter(config, unet)
    earlier = adapter.info.training
    run = start_run(config, {"student": Student(unet, adapter)})
    if run.sharded:
        raise ConfigError(
            "SUN trains 38 million parameters: FSDP has nothing to share out, and its U-Net calls differ between "
            "processes. Launch without FSDP (DDP)."
        )
    device = run.accelerator.device
    vae.to(device)
    run.place(unet, text_encoder)
    use_fast_attention(unet, device)
    models = FrozenModels(unet, config.fine_tunes)
    attach(unet, adapter)
    schedule = NoiseSchedule(pipe.scheduler.alphas_cumprod).to(device)
    teacher = Teacher(unet, config.guidance_scale)
    scale = latent_scale(vae)
    resolution = config.resolution or unet.config.sample_size * scale

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        return encode_texts(tokenizer, text_encoder, texts)

    source = run.track(
        "data",
        build_source(
            config.data, vae, resolution, run.rng, device,
            seed=config.run.seed, workers=config.workers, cache=config.cache, encode=encode,
        ),
    )  # fmt: skip
    negatives = NegativePrompts.load(
        config.negatives, config.data, config.max_negative_phrases, config.empty_negative_probability
    )
    prompts = Prompts(source, negatives, run.rng, source.encoder(encode), config.empty_captions, config.run.batch_size)
    shape = (unet.config.in_channels, resolution // scale, resolution // scale)
    shared = replace(config, bank_size=max(1, config.bank_size // len(models)))
    objectives = [
        make_objective(shared, run, prompts, teacher, schedule, pipe.scheduler.config, shape, str(i or ""))
        for i in range(len(models))
    ]
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
            save_adapter(config, run, adapter, earlier)
            sample_grid(config, run, pipe)
    path = save_adapter(config, run, adapter, earlier)
    sample_grid(config, run, pipe)
    detach(unet)
    return path


def latent_scale(vae: Any) -> int:
    """Pixels to a side of one latent: 8 for Stable Diffusion's autoencoders."""
    stages = vae.config.get("decoder_block_out_channels") or vae.config.block_out_channels
    return int(2 ** (len(stages) - 1))


def check_settings(config: SunTrainConfig) -> None:
    """Raise ConfigError for an unknown word or a number outside its range."""
    if config.msc_error not in ("noise", "state"):
        raise ConfigError(f"msc_error is noise or state, not {config.msc_error!r}.")
    if config.teacher_solver not in ("dpmpp_2m", "ddim"):
        raise ConfigError(f"teacher_solver is dpmpp_2m or ddim, not {config.teacher_solver!r}.")
    if not 0.001 <= config.stage_length <= 1:
        raise ConfigError(
            f"stage_length is a share of all timesteps, from 0.001 (one of 1000) to 1, not {config.stage_length:g}."
        )
    if config.fine_tunes and not config.trajectories:
        raise ConfigError("fine_tunes needs trajectories = true: the pictures of data are those of one model alone.")
    _check_unused(config)
    if config.trajectories and abs(round(1 / config.stage_length) * config.stage_length - 1) > 1e-6:
        raise ConfigError(
            f"with trajectories, stage_length is 1 over a whole number (0.25, 0.2, 0.125), not {config.stage_length:g}."
        )
    if config.resolution < 0 or config.resolution % 8:
        raise ConfigError(f"resolution is a multiple of 8 pixels, or 0 for the model's own, not {config.resolution}.")
    if config.guidance_scale <= 0:
        raise ConfigError(f"guidance_scale is above 0 (1: none), not {config.guidance_scale:g}.")
    if config.huber_c < 0:
        raise ConfigError(f"huber_c is 0 (squared errors) or above, not {config.huber_c:g}.")
    for name in ("substeps", "target_reuse", "replace_depth", "bank_size", "max_negative_phrases"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is a number of at least 1, not {getattr(config, name)}.")
    for name in (
        "replace_probability", "stage_start_probability", "rollout_probability", "empty_captions",
        "empty_negative_probability",
    ):  # fmt: skip
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"{name} is a probability, from 0 to 1, not {getattr(config, name):g}.")
    low, high = config.guidance_range
    if any(config.guidance_range) and not 0 < low <= config.guidance_scale <= high:
        raise ConfigError(
            f"guidance_range {low:g} to {high:g} must be above 0 and hold guidance_scale ({config.guidance_scale:g})."
        )


def _check_unused(config: SunTrainConfig) -> None:
    """Raise ConfigError for settings that would do nothing."""
    on_trajectories = ("teacher_solver", "bank_size", "replace_depth", "rollout_probability")
    needed = "false" if config.trajectories else "true"
    for name in ("pure_noise_at_start",) if config.trajectories else on_trajectories:
        if getattr(config, name) != getattr(SunTrainConfig, name):
            raise ConfigError(f"{name} only acts with trajectories = {needed}: leave it out, or change that.")


def make_adapter(config: SunTrainConfig, unet: Any) -> SunAdapter:
    """A new adapter with K/V copied from the U-Net, or the one to continue from."""
    if config.init_adapter:
        path = EMOJI_SUN if config.init_adapter == "emoji" else config.init_adapter
        adapter = SunAdapter.load(path, dtype=torch.float32)
        if adapter.guided and not any(config.guidance_range):
            raise ConfigError("init_adapter takes the guidance scale: set guidance_range.")
        if any(config.guidance_range):
            adapter = adapter if adapter.guided else widen(adapter, config.guidance_scale)
            if adapter.info.guidance_scale != config.guidance_scale:
                raise ConfigError(
                    f"init_adapter counts guidance scales from {adapter.info.guidance_scale:g}, its own: set "
                    f"guidance_scale to that, not to {config.guidance_scale:g}."
                )
    else:
        guided = any(config.guidance_range)
        adapter = from_unet(
            unet, positive=config.positive_branch, alpha=config.init_alpha, w=config.guidance_scale, guided=guided,
            info=SunInfo(normalized=config.attention_normalization),
        )  # fmt: skip
    return adapter.float().requires_grad_(True).train()


def save_adapter(
    config: SunTrainConfig, run: TrainingRun, adapter: SunAdapter, earlier: dict[str, Any] | None = None
) -> Path:
    """Write the averaged adapter in fp16 with what a reader needs to know of its training and the ``earlier`` one."""
    settings = without_folders(config)
    adapter.info.base_model = "Emoji Diffusion" if config.model == "emoji" else settings["model"]
    adapter.info.guidance_scale = config.guidance_scale
    adapter.info.stage_length = config.stage_length
    progress = {**run.facts(), "machine": describe_machine()}
    # What the adapter is; one to go on from brings its own.
    settings |= {"positive_branch": adapter.positive, "attention_normalization": adapter.info.normalized}
    adapter.info.training = {**settings, **progress, **({"from": earlier} if earlier else {})}
    path = run.folder / "adapter.safetensors"
    if run.accelerator.is_main_process:
        with run.averaged():
            adapter.save(path, dtype=torch.float16)
    return path


@torch.no_grad()
def sample_grid(config: SunTrainConfig, run: TrainingRun, pipe: Any) -> None:
    """Reference row (25 steps, CFG) over SUN row (4 steps), same noise, as a PNG beside the checkpoint."""
    if not run.accelerator.is_main_process:
        return
    from ..evaluation import Sampler
    from ..pictures.png import save_grid

    prompts, negatives = sample_prompts(config)
    sampler = Sampler(
        pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler, w=config.guidance_scale, attached=True
    )
    noise = sampler.noise(len(prompts), seed=0)
    with run.averaged(), run.accelerator.autocast():
        rows = [sampler.decode(sampler(method, prompts, negatives, noise).latents) for method in ("dpmpp-25", "sun-4")]
    save_grid(
        [image for row in rows for image in row], len(prompts), run.folder / "samples" / f"{run.progress.step:06d}.png"
    )
    run.say(f"step {run.progress.step}: {run.average_losses()}")


def sample_prompts(config: SunTrainConfig) -> tuple[list[str], list[str]]:
    if config.model == "emoji" or is_emoji(config.data):
        from ..lab.emoji.base import SAMPLE_PROMPTS

        return list(SAMPLE_PROMPTS[:8]), ["", "", "white background", "", "small", "", "pink background, blurry", ""]
    return ["a photo of a cat", "a castle on a hill, oil painting", "portrait of an old man", "a bowl of fruit"], [
        "",
        "blurry",
        "",
        "low quality",
    ]
