"""The settings of a run and of SUN's training, and what they may be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from ..common.devices import AUTOCAST
from ..common.settings import ConfigError
from ..common.worlds import EMOJI
from ..shipped import SHIPPED

OptimizerName = Literal["adamw", "fused", "8bit"]
DTYPES = {"fp32": torch.float32, **AUTOCAST}
MOST_VIRTUAL = 1000


@dataclass
class RunConfig:
    """Length, optimiser and bookkeeping of a run. Times are minutes of training, counted across resumes.
    A run ends when the first of ``steps``, ``minutes`` and ``unet_calls`` is reached; 0 minutes or calls: no such end.

    A step is one update of the weights; it sees ``batch_size`` x ``accumulate`` x processes pictures.
    """

    output: str = "runs/run"
    steps: int = 1000
    minutes: float = 0.0
    # Calls of the U-Net, forward 1 and backward 2, the teacher's included: an equal budget for methods to be compared.
    unet_calls: int = 0
    batch_size: int = 32  # pictures at a time, on each process
    accumulate: int = 1  # batches whose gradients are averaged before an update
    lr: float = 1e-4
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    # Of the arithmetic (autocast). auto: bf16 where the device has it, else fp32.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    frozen: Literal["fp32", "bf16", "fp16"] = "fp32"  # in which models that do not train are kept
    seed: int = 0
    checkpoint_minutes: float = 5.0
    sample_minutes: float = 10.0
    resume: bool = True


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
    model: str = SHIPPED
    # Folders of fine-tunes of `model`: their U-Nets take turns with its own, `target_reuse` steps each, with its text
    # encoder, and share the `bank_size` trajectories. Each stays in memory.
    fine_tunes: tuple[str, ...] = ()
    # So many more that nobody trained take turns too (virtual.py): random low-rank changes of the base, and, where
    # there are fine-tunes, random mixtures with them. Nothing is kept of them.
    virtual_fine_tunes: int = 0
    virtual_rank: int = 4
    virtual_strength: float = 0.05  # Frobenius norm of a matrix's change, in parts of the matrix's own
    data: str = f"{EMOJI}:twemoji"
    # Whether `data` may be the output of a command (pipe:...). Only the command line can say so, never a file.
    allow_commands: bool = field(default=False, metadata={"typed": True})
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
    # Share of trajectories that begin at a noised picture of `data` under another's caption, as image to image does.
    picture_starts: float = 0.0
    # Above 0, trajectories come in pairs of one noise and caption with two negatives, and the error of what a negative
    # changes is added to the loss, so many times.
    negative_weight: float = 0.0
    # Trajectories kept, in memory and in checkpoints (up to 3 MB each at 512 pixels); every `target_reuse`-th step adds
    # a batch of them.
    bank_size: int = 4096
    replace_depth: int = 1  # how many stages earlier the student may start whose state replaces the input
    rollout_probability: float = 0.0  # share of steps trained through all stages, on the distance of the last state


_FROM_ZERO = (
    "steps",
    "minutes",
    "unet_calls",
    "lr",
    "warmup_steps",
    "weight_decay",
    "checkpoint_minutes",
    "sample_minutes",
)


def check_run(config: RunConfig, precision: str) -> None:
    """Raise ConfigError for settings of a run that cannot work. ``precision`` is the resolved one."""
    check_numbers(config)
    if config.lr_schedule not in ("constant", "cosine"):
        raise ConfigError(f"lr_schedule is constant or cosine, not {config.lr_schedule!r}.")
    if config.frozen not in ("fp32", precision):
        raise ConfigError(
            f"frozen = {config.frozen} needs precision = {config.frozen}: half-precision weights are only used by "
            "arithmetic of the same format."
        )


def check_numbers(config: RunConfig) -> None:
    """Raise ConfigError for a number outside its range."""
    if config.accumulate < 1 or config.batch_size < 1:
        raise ConfigError("batch_size and accumulate are numbers of pictures and batches: at least 1.")
    for name in _FROM_ZERO:
        if getattr(config, name) < 0:
            raise ConfigError(f"{name} is 0 or above, not {getattr(config, name):g}.")
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed is a number from 0 to {2**32 - 1}, not {config.seed}.")
    if config.max_grad_norm <= 0:
        raise ConfigError(f"max_grad_norm is above 0, not {config.max_grad_norm:g}: every gradient would become 0.")
    if not 0 <= config.ema_decay < 1 or not all(0 <= beta < 1 for beta in config.betas):
        raise ConfigError(f"ema_decay ({config.ema_decay:g}) and betas {config.betas} are from 0 to below 1.")


def check_settings(config: SunTrainConfig) -> None:
    """Raise ConfigError for an unknown word or a number outside its range."""
    check_numbers(config.run)
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
    if config.virtual_fine_tunes and not config.trajectories:
        raise ConfigError("virtual_fine_tunes needs trajectories = true: data has no pictures of theirs.")
    if config.virtual_strength < 0 or config.virtual_fine_tunes < 0 or config.virtual_rank < 1:
        raise ConfigError("virtual_fine_tunes and virtual_strength are 0 or above, virtual_rank 1 or above.")
    if config.virtual_fine_tunes > MOST_VIRTUAL:  # each keeps trajectories of its own
        raise ConfigError(f"virtual_fine_tunes is {MOST_VIRTUAL} at most, not {config.virtual_fine_tunes}.")
    if config.virtual_fine_tunes and not config.virtual_strength and not config.fine_tunes:
        raise ConfigError("virtual_strength = 0 without fine_tunes: the virtual ones would all be the base itself.")
    _check_unused(config)
    if config.trajectories and abs(round(1 / config.stage_length) * config.stage_length - 1) > 1e-6:
        raise ConfigError(
            f"with trajectories, stage_length is 1 over a whole number (0.25, 0.2, 0.125), not {config.stage_length:g}."
        )
    if config.resolution < 0 or config.resolution % 8:
        raise ConfigError(f"resolution is a multiple of 8 pixels, or 0 for the model's own, not {config.resolution}.")
    if config.guidance_scale <= 0:
        raise ConfigError(f"guidance_scale is above 0 (1: none), not {config.guidance_scale:g}.")
    if config.negative_weight < 0:
        raise ConfigError(f"negative_weight is 0 or above, not {config.negative_weight:g}.")
    if config.negative_weight and config.run.batch_size % 2:
        raise ConfigError(
            f"negative_weight pairs the rows of a batch: batch_size is even, not {config.run.batch_size}."
        )
    if config.negative_weight and config.bank_size % 2:
        raise ConfigError(f"negative_weight pairs trajectories: bank_size is even, not {config.bank_size}.")
    if config.huber_c < 0:
        raise ConfigError(f"huber_c is 0 (squared errors) or above, not {config.huber_c:g}.")
    for name in ("substeps", "target_reuse", "replace_depth", "bank_size", "max_negative_phrases"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is a number of at least 1, not {getattr(config, name)}.")
    for name in (
        "replace_probability",
        "stage_start_probability",
        "rollout_probability",
        "picture_starts",
        "empty_captions",
        "empty_negative_probability",
    ):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"{name} is a probability, from 0 to 1, not {getattr(config, name):g}.")
    low, high = config.guidance_range
    if any(config.guidance_range) and not 0 < low <= config.guidance_scale <= high:
        raise ConfigError(
            f"guidance_range {low:g} to {high:g} must be above 0 and hold guidance_scale ({config.guidance_scale:g})."
        )


def _check_unused(config: SunTrainConfig) -> None:
    """Raise ConfigError for settings that would do nothing."""
    on_trajectories = (
        "teacher_solver",
        "bank_size",
        "replace_depth",
        "rollout_probability",
        "picture_starts",
        "negative_weight",
    )
    needed = "false" if config.trajectories else "true"
    for name in ("pure_noise_at_start",) if config.trajectories else on_trajectories:
        if getattr(config, name) != getattr(SunTrainConfig, name):
            raise ConfigError(f"{name} only acts with trajectories = {needed}: leave it out, or change that.")
    for name in () if config.virtual_fine_tunes else ("virtual_rank", "virtual_strength"):
        if getattr(config, name) != getattr(SunTrainConfig, name):
            raise ConfigError(f"{name} only acts with virtual_fine_tunes above 0: leave it out, or set that.")
