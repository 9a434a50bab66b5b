"""Guided distillation: the full U-Net learns SUN's stage targets without an adapter (after arXiv 2210.03142).

Every recipe of SUN's training is there for it, guided trajectories too, so that what differs is what is trained.

The student starts as a copy of the model and takes the caption alone; classifier-free guidance with the empty
negative prompt, and the whole stage of the trajectory, are distilled into its weights. It must be trained anew for
every model, and takes no negative prompt: the two things an adapter avoids.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...compact.pipelines import save_unet
from ...pipelines.schedulers import make_scheduler
from ...training.config import RunConfig, SunTrainConfig, check_settings
from ...training.data.negative_phrases import NegativePrompts
from ...training.models import load_frozen, use_fast_attention
from ...training.run import start_run
from ...training.student import Teacher
from ...training.targets import Prompts, make_objective
from .setup import Distillation, PeerConfig

USAGE = """```python
unet = UNet2DConditionModel.from_pretrained("this folder", subfolder="unet")
pipe = StableDiffusionPipeline.from_pretrained("the base model", unet=unet)
pipe.scheduler = DDIMScheduler.from_config(
    pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
)
pipe(prompt, num_inference_steps=4, guidance_scale=1.0)
```"""


@dataclass
class GuidedDistillConfig(PeerConfig):
    """The settings of SUN's training (``SunTrainConfig``) but those of an adapter and of negative prompts."""

    run: RunConfig = field(
        default_factory=lambda: RunConfig(output="runs/guided-distill", steps=5000, batch_size=32, lr=1e-5)
    )
    cfg_weight: float = 1.0
    msc_weight: float = 1.0
    msc_error: str = "noise"
    stage_length: float = 0.25
    substeps: int = 6
    replace_probability: float = 0.1
    stage_start_probability: float = 0.0
    target_reuse: int = 1
    trajectories: bool = False
    teacher_solver: str = "dpmpp_2m"
    picture_starts: float = 0.0
    bank_size: int = 4096
    replace_depth: int = 1
    rollout_probability: float = 0.0

    def as_sun(self) -> SunTrainConfig:
        """The same settings for the functions of SUN's training."""
        return SunTrainConfig(**{item.name: getattr(self, item.name) for item in fields(self)})


class Student(nn.Module):
    """A U-Net to train, predicting noise [B, 4, h, w] of x at t [B] with text states [B, L, D], without a negative."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, x: Tensor, t: Tensor, positive: Tensor, negative: Tensor | None = None, w: Tensor | None = None
    ) -> Tensor:
        return self.unet(x, t, positive).sample.float()


def train_guided_distillation(config: GuidedDistillConfig) -> Path:
    """Train and write the student as ``unet/`` with a card into ``run.output``; returns that folder."""
    check_settings(config.as_sun())
    pipe = load_frozen(config.model)
    unet = copy.deepcopy(pipe.unet).requires_grad_(True)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    run = start_run(config, {"student": Student(unet.train())})
    work = Distillation(config, pipe, run)
    use_fast_attention(unet, work.device)
    run.calls.watch(unet)
    student = run.modules["student"]
    teacher = Teacher(pipe.unet, config.guidance_scale)
    scheduler = make_scheduler("ddim", pipe.scheduler.config)
    prompts = Prompts(
        work.source,
        NegativePrompts([], 0, 1.0),
        run.rng,
        work.source.encoder(work.encode),
        config.empty_captions,
        config.run.batch_size,
    )
    objective = make_objective(config.as_sun(), run, prompts, teacher, work.schedule, pipe.scheduler.config, work.shape)
    for step in run.steps():
        with run.accelerator.autocast():
            losses = objective.losses(step)
        run.update(losses.pop("total"), **losses)
        if run.time_to_sample():
            save_student(work, unet)
            work.sample_grid(student, scheduler)
    save_student(work, unet)
    work.sample_grid(student, scheduler)
    return run.folder


def save_student(work: Distillation, unet: Any) -> None:
    """Write the averaged U-Net in fp16 as a diffusers folder ``unet/``, with its card."""
    state = work.run.averaged_state("student")
    if not work.run.accelerator.is_main_process:
        return
    tensors = {name.removeprefix("unet."): weight.half() for name, weight in state.items()}
    save_unet(unet, tensors, work.run.folder / "unet")
    count = sum(weight.numel() for weight in state.values())
    work.write_card("Guided distillation", USAGE, {"method": "guided distillation", "parameters": count})
