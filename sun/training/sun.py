"""Train a SUN adapter on a frozen diffusers-format SD 1.x model (Algorithm 1; equations in ``algorithm.py``).

Only the adapter trains. The U-Net runs as teacher (no SUN, classifier-free guidance) and as student (SUN, one call).
"""

from __future__ import annotations

import json
import random
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import SunAdapter
from ..pipelines import attach, detach
from ..text import encode_texts
from .algorithm import NoiseSchedule, StageTargets, add_noise, guided_noise, stage_targets
from .data import Source, build_source
from .negatives import NegativePrompts
from .run import RunConfig, TrainingRun
from .speed import use_fast_attention
from .trajectories import TrajectoryBank, run_teacher


@dataclass
class SunTrainConfig:
    """Every symbol of Algorithm 1 as a setting, with the paper's value as default where the paper states one.

    Stated: ``guidance_scale`` w = 8, ``msc_weight`` lambda = 1, ``stage_length`` Delta = 0.25, ``replace_probability``
    p = 0.1, AdamW with lr 1e-4 and weight decay 0.01. Ours where it is silent: ``substeps`` N, the initialisation
    (K/V copied from the U-Net, ``init_alpha``), and the options from ``stage_start_probability`` down, which are
    off by default.
    """

    run: RunConfig = field(default_factory=lambda: RunConfig(output="runs/sun", steps=5000, batch_size=32, lr=1e-4))
    model: str = "emoji"
    data: str = "emoji:twemoji"
    resolution: int = 0  # 0: the model's own
    negatives: str = "auto"  # auto | a text file, one phrase a line
    max_negative_phrases: int = 100
    empty_negative_probability: float = 0.05
    guidance_scale: float = 8.0
    cfg_weight: float = 1.0
    msc_weight: float = 1.0
    stage_length: float = 0.25
    substeps: int = 6
    replace_probability: float = 0.1
    positive_branch: bool = True
    init_alpha: float = 0.5
    init_adapter: str = ""
    empty_captions: float = 0.0
    stage_start_probability: float = 0.0  # share of timesteps drawn from 999, 749, 499, 249 instead of all
    pure_noise_at_start: bool = False  # x_999 is pure noise, as at inference, instead of noised data
    target_reuse: int = 1  # student updates per teacher batch, drawn from a short replay buffer
    gradient_checkpointing: bool = False
    trajectories: bool = False  # inputs are states of the teacher's guided trajectory from pure noise, not noised data
    teacher_solver: str = "dpmpp_2m"  # of trajectories: dpmpp_2m | ddim; Algorithm 1 steps with DDIM
    bank_size: int = 4096  # trajectories kept; every `target_reuse`-th step adds a batch of them
    replace_depth: int = 1  # how many stages earlier the student may start whose state replaces the input
    rollout_probability: float = 0.0  # share of steps trained through all stages, on the distance of the last state


class Student(nn.Module):
    """The frozen U-Net with SUN as one trainable module: its parameters are the adapter's alone."""

    def __init__(self, unet: nn.Module, adapter: SunAdapter):
        super().__init__()
        self.adapter = adapter
        self._unet = (unet,)  # in a tuple: not registered, so never trained, saved or averaged

    def forward(self, x: Tensor, t: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Predicted noise [B, 4, H, W] in one call; ``positive`` and ``negative`` are text states [B, L, D]."""
        kwargs = {"sun_negative": negative}
        return self._unet[0](x, t, positive, cross_attention_kwargs=kwargs).sample.float()


class Teacher:
    """e_cfg of the frozen U-Net: both prompts in one batch of twice the size."""

    def __init__(self, unet: nn.Module, guidance_scale: float):
        self.unet, self.w = unet, guidance_scale

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        both = self.unet(torch.cat([x, x]), torch.cat([t, t]), torch.cat([positive, negative])).sample.float()
        e_positive, e_negative = both.chunk(2)
        return guided_noise(e_positive, e_negative, self.w)


def draw_timesteps(config: SunTrainConfig, count: int, total: int, generator: random.Random) -> Tensor:
    """Timesteps 0..T-1: uniform, or with ``stage_start_probability`` one of the stage starts (999, 749, 499, 249)."""
    stage = round(config.stage_length * total)
    starts = list(range(total - 1, 0, -stage))
    drawn = [
        generator.choice(starts) if generator.random() < config.stage_start_probability else generator.randrange(total)
        for _ in range(count)
    ]
    return torch.tensor(drawn)


def start_timesteps(config: SunTrainConfig, t: Tensor, total: int, generator: random.Random) -> Tensor:
    """Where each row begins: ``t``, or with probability p one stage earlier where there is an earlier stage."""
    stage = round(config.stage_length * total)
    replaced = torch.tensor([generator.random() < config.replace_probability for _ in range(len(t))]) & (
        t + stage < total
    )
    return torch.where(replaced, t + stage, t)


def sun_losses(predicted: Tensor, targets: StageTargets) -> tuple[Tensor, Tensor]:
    """(L_cfg, L_msc), both at the same input x_t (Eq. 8 and 11)."""
    return F.mse_loss(predicted, targets.e_cfg), F.mse_loss(predicted, targets.e_step)


@dataclass
class PromptSource:
    """Captions of the data with random negatives, and their text states [B, 77, D]."""

    tokenizer: Any
    text_encoder: Any
    source: Source
    negatives: NegativePrompts
    rng: random.Random
    empty_captions: float
    batch_size: int

    def draw(self) -> tuple[Tensor, list[str], list[str]]:
        """(latents [B, 4, h, w], captions, negatives)."""
        x0, captions = self.source(self.batch_size)
        captions = ["" if self.rng.random() < self.empty_captions else c for c in captions]
        return x0, captions, [self.negatives.draw(self.rng) for _ in captions]

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        return encode_texts(self.tokenizer, self.text_encoder, texts)


class _NoisedDataTargets:
    """The paper's Algorithm 1: inputs are noised data."""

    def __init__(
        self, config: SunTrainConfig, prompts: PromptSource, teacher: Teacher, student: Any,
        schedule: NoiseSchedule, rng: random.Random,
    ):  # fmt: skip
        self.config, self.prompts, self.teacher, self.student = config, prompts, teacher, student
        self.schedule, self.rng = schedule, rng
        self.recent: deque[tuple[StageTargets, Tensor, Tensor]] = deque(maxlen=16)

    @torch.no_grad()
    def _new(self) -> tuple[StageTargets, Tensor, Tensor]:
        config, total = self.config, self.schedule.num_train_timesteps
        x0, captions, negatives = self.prompts.draw()
        positive, negative = self.prompts.encode(captions), self.prompts.encode(negatives)
        t = draw_timesteps(config, len(x0), total, self.rng)
        start = start_timesteps(config, t, total, self.rng).to(x0.device)
        t = t.to(x0.device)
        noise = torch.randn_like(x0)
        x_start = add_noise(x0, noise, start, self.schedule)
        if config.pure_noise_at_start:
            x_start = torch.where((start == total - 1).view(-1, 1, 1, 1), noise, x_start)
        targets = stage_targets(
            x_start, start, t, round(config.stage_length * total), config.substeps,
            lambda x, k, rows: self.teacher(x, k, positive[rows], negative[rows]),
            lambda x, k, rows: self.student(x, k, positive[rows], negative[rows]), self.schedule,
        )  # fmt: skip
        return targets, positive, negative

    def losses(self, step: int) -> dict[str, Tensor]:
        if not self.recent or step % self.config.target_reuse == 0:
            self.recent.append(self._new())
            picked = self.recent[-1]
        else:
            picked = self.recent[self.rng.randrange(len(self.recent))]
        return _weighted(self.config, self.student, *picked)


class _TrajectoryTargets:
    """Inputs are states of the teacher's guided trajectories; see ``trajectories.py``."""

    def __init__(
        self, config: SunTrainConfig, prompts: PromptSource, teacher: Teacher, student: Any, schedule: NoiseSchedule,
        scheduler_config: Any, shape: tuple[int, int, int], rng: random.Random,
    ):  # fmt: skip
        self.config, self.prompts, self.teacher, self.student, self.rng = config, prompts, teacher, student, rng
        self.scheduler_config, self.shape = scheduler_config, shape
        stages = round(1 / config.stage_length)
        self.bank = TrajectoryBank(
            config.bank_size, stages, schedule, rng, torch.device(schedule.alphas_cumprod.device)
        )

    def _grow(self) -> None:
        _, positives, negatives = self.prompts.draw()
        noise = torch.randn(len(positives), *self.shape, device=self.bank.device)
        states, guided = run_teacher(
            self.teacher, noise, self.prompts.encode(positives), self.prompts.encode(negatives), self.bank.stages,
            self.config.substeps, self.config.teacher_solver, self.scheduler_config,
        )  # fmt: skip
        self.bank.add(states, guided, positives, negatives)

    def losses(self, step: int) -> dict[str, Tensor]:
        config = self.config
        if not self.bank.rows or step % config.target_reuse == 0:
            self._grow()
        rows = self.bank.pick(config.run.batch_size)
        positive = self.prompts.encode([r.positive for r in rows])
        negative = self.prompts.encode([r.negative for r in rows])
        if self.rng.random() < config.rollout_probability:
            distance = self.bank.rollout(rows, self.student, positive, negative)
            return {"total": distance, "rollout": distance.detach()}
        targets = self.bank.stage_batch(
            rows, self.student, self.teacher, positive, negative, config.replace_probability, config.replace_depth,
            need_guided=config.cfg_weight > 0,
        )  # fmt: skip
        return _weighted(config, self.student, targets, positive, negative)


def _weighted(
    config: SunTrainConfig, student: Any, targets: StageTargets, positive: Tensor, negative: Tensor
) -> dict[str, Tensor]:
    """``total`` = cfg_weight L_cfg + msc_weight L_msc, and both."""
    cfg, msc = sun_losses(student(targets.x_t, targets.t, positive, negative), targets)
    return {"total": config.cfg_weight * cfg + config.msc_weight * msc, "cfg": cfg.detach(), "msc": msc.detach()}


def train_sun(config: SunTrainConfig) -> Path:
    """Train and write ``<output>/adapter.safetensors`` with its settings in the header; returns the file."""
    pipe = load_base(config.model)
    unet, vae, text_encoder, tokenizer = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
    for module in (unet, vae, text_encoder):
        module.requires_grad_(False).eval()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    adapter = make_adapter(config, unet)
    run = TrainingRun(config.run, {"student": Student(unet, adapter)})
    student_module = run.modules["student"]
    device = run.accelerator.device
    for module in (unet, vae, text_encoder):
        module.to(device)
    use_fast_attention(unet, device)
    attach(unet, adapter)
    schedule = NoiseSchedule(pipe.scheduler.alphas_cumprod).to(device)
    teacher = Teacher(unet, config.guidance_scale)
    rng = random.Random(config.run.seed + 7919 * run.progress.step + run.accelerator.process_index)
    resolution = config.resolution or unet.config.sample_size * 2 ** (
        len(vae.config.get("decoder_block_out_channels") or vae.config.block_out_channels) - 1
    )
    source = build_source(config.data, vae, resolution, rng, device)
    negatives = NegativePrompts.load(
        config.negatives, config.data, config.max_negative_phrases, config.empty_negative_probability
    )
    (run.folder / "config.json").write_text(json.dumps(asdict(config), indent=2))
    prompts = PromptSource(
        tokenizer, text_encoder, source, negatives, rng, config.empty_captions, config.run.batch_size
    )
    shape = (unet.config.in_channels, resolution // 8, resolution // 8)
    targets = (
        _TrajectoryTargets(config, prompts, teacher, student_module, schedule, pipe.scheduler.config, shape, rng)
        if config.trajectories
        else _NoisedDataTargets(config, prompts, teacher, student_module, schedule, rng)
    )
    sampled = run.progress.seconds
    for step in run.steps():
        with run.accelerator.autocast():
            losses = targets.losses(step)
        run.update(losses.pop("total"), **losses)
        if run.progress.seconds - sampled > 60 * config.run.sample_minutes:
            sampled = run.progress.seconds
            save_adapter(config, run, adapter)
            sample_grid(config, run, pipe)
    path = save_adapter(config, run, adapter)
    sample_grid(config, run, pipe)
    detach(unet)
    return path


def load_base(model: str) -> Any:
    """StableDiffusionPipeline of a diffusers folder, or of the shipped model for ``emoji``."""
    from diffusers import StableDiffusionPipeline

    from ..shipped import EMOJI_DIFFUSION

    folder = EMOJI_DIFFUSION if model == "emoji" else Path(model)
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(
            f"{folder} is not a diffusers folder (no model_index.json). Give --model the folder of an SD 1.x model."
        )
    return StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, safety_checker=None, feature_extractor=None
    )


def make_adapter(config: SunTrainConfig, unet: Any) -> SunAdapter:
    """A new adapter with K/V copied from the U-Net, or the one to continue from."""
    if config.init_adapter:
        adapter = SunAdapter.load(config.init_adapter, dtype=torch.float32)
    else:
        adapter = SunAdapter.from_unet(unet, positive=config.positive_branch, alpha=config.init_alpha)
    return adapter.float().requires_grad_(True).train()


def save_adapter(config: SunTrainConfig, run: TrainingRun, adapter: SunAdapter) -> Path:
    """Write the averaged adapter in fp16 with what a reader needs to know of its training."""
    settings = asdict(config)
    settings["run"].pop("output")
    for name in ("model", "data", "negatives", "init_adapter"):
        settings[name] = Path(settings[name]).name  # a file that travels names no folders of this machine
    adapter.info.base_model = "Emoji Diffusion" if config.model == "emoji" else settings["model"]
    adapter.info.guidance_scale = config.guidance_scale
    adapter.info.stage_length = config.stage_length
    progress = {**run.progress.state_dict(), "processes": run.accelerator.num_processes}
    adapter.info.training = {**settings, **progress}
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
    from ..images import save_grid

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
    if config.model == "emoji" or config.data.startswith("emoji"):
        from ..emoji.base import SAMPLE_PROMPTS

        return list(SAMPLE_PROMPTS[:8]), ["", "", "white background", "", "small", "", "pink background, blurry", ""]
    return ["a photo of a cat", "a castle on a hill, oil painting", "portrait of an old man", "a bowl of fruit"], [
        "",
        "blurry",
        "",
        "low quality",
    ]
