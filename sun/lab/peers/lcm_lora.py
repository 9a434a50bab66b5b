"""LCM-LoRA: latent consistency distillation into a LoRA of the U-Net (arXiv 2310.04378, 2311.05556).

    f(x, t) = c_skip(t) x + c_out(t) (x - sigma_t e(x, t)) / a_t          consistency function
    x^_s    = DDIM step from t to s = t - k with e_cfg of the frozen model     (k: skipping step)
    L       = d(f_theta(x_t, t), f_theta-(x^_s, s))                       theta-: running average of theta

c_skip and c_out are those of diffusers' LCMScheduler, which also samples. The negative prompt is the empty one, as in
the papers, so the result takes none.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from torch import Tensor, nn

from ...common.settings import ConfigError
from ...surgery import from_unet
from ...training.algorithm import NoiseSchedule, add_noise, ddim_update, pseudo_huber
from ...training.config import RunConfig
from ...training.models import load_frozen
from ...training.run import start_run
from ...training.student import Teacher
from .setup import Batch, Distillation, PeerConfig

ADAPTER = "lcm"
# Attention, feed-forward, convolutions and time embeddings: the layers LCM-LoRA for Stable Diffusion adapts.
TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
USAGE = """```python
pipe.load_lora_weights("this folder")
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe(prompt, num_inference_steps=4, guidance_scale=1.0)
```"""


@dataclass
class LcmLoraConfig(PeerConfig):
    """Settings of latent consistency distillation.

    ``run.ema_decay`` is the papers' mu: the averaged weights are the target network and what is written; 0 takes the
    student itself as target. ``guidance_scale`` is w as in e_cfg = w e(c_p) + (1 - w) e(""), one more than the
    papers' omega; with ``guidance_scale_max`` each picture draws its own w between the two.
    """

    run: RunConfig = field(
        default_factory=lambda: RunConfig(output="runs/lcm-lora", steps=5000, batch_size=32, lr=1e-4, ema_decay=0.95)
    )
    guidance_scale_max: float = 0.0  # 0: w is fixed
    skipping_step: int = 20  # k
    rank: int = 0  # 0: about as many parameters as a SUN adapter with both branches
    targets: tuple[str, ...] = TARGETS
    loss: Literal["huber", "l2"] = "huber"
    huber_c: float = 0.001

    def check(self) -> None:
        """Raise ConfigError for values that cannot be trained with."""
        if self.guidance_scale_max and self.guidance_scale_max < self.guidance_scale:
            raise ConfigError("guidance_scale_max is below guidance_scale: raise it, or set it to 0 for a fixed w.")
        if self.skipping_step < 1 or self.rank < 0 or self.huber_c <= 0:
            raise ConfigError("skipping_step is at least 1, rank at least 0 and huber_c above 0.")


class LoraStudent(nn.Module):
    """A frozen U-Net with a LoRA as one trainable module: its parameters are the LoRA's alone."""

    def __init__(self, unet: Any, rank: int, targets: tuple[str, ...]) -> None:
        super().__init__()
        # alpha = rank, scale 1: programs that read no alpha from the file assume just that
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), ADAPTER)
        layers = [(n, m) for n, m in unet.named_modules() if hasattr(m, "lora_A") and ADAPTER in m.lora_A]
        self.lora = nn.ModuleList(getattr(m, part)[ADAPTER] for _, m in layers for part in ("lora_A", "lora_B"))
        self.names = [f"{name}.{part}.weight" for name, _ in layers for part in ("lora_A", "lora_B")]
        self._unet = (unet,)  # in a tuple: not registered, so never trained, saved or averaged

    def forward(self, x: Tensor, t: Tensor, positive: Tensor) -> Tensor:
        """Predicted noise [B, 4, h, w] of x at t [B] with text states [B, L, D]."""
        return self._unet[0](x, t, positive).sample.float()

    @contextmanager
    def without_lora(self) -> Iterator[Any]:
        """The U-Net without the LoRA, inside the context."""
        self._unet[0].disable_lora()
        try:
            yield self._unet[0]
        finally:
            self._unet[0].enable_lora()

    def file(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """This module's state dict under diffusers' names and in fp16, as a LoRA file holds it."""
        named = {name: state[f"lora.{i}.weight"].half().contiguous() for i, name in enumerate(self.names)}
        return convert_state_dict_to_diffusers(named)


def parameters_per_rank(unet: nn.Module, targets: tuple[str, ...]) -> int:
    """How many parameters each rank of a LoRA on ``targets`` has: inputs plus outputs of every layer.

    Raises ConfigError when no layer of the U-Net bears any of these names.
    """
    count = 0
    for name, module in unet.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name.endswith(tuple(f".{target}" for target in targets)):
            count += prod(module.weight.shape[1:]) + module.weight.shape[0]
    if not count:
        raise ConfigError(f"the U-Net has no layer named {', '.join(targets)}; leave out targets for the usual ones.")
    return count


def like_sun(unet: nn.Module, targets: tuple[str, ...]) -> int:
    """The rank whose LoRA has about as many parameters as a SUN adapter of this U-Net with both branches."""
    wanted = sum(p.numel() for p in from_unet(unet).parameters())
    return max(1, round(wanted / parameters_per_rank(unet, targets)))


def draw_timesteps(count: int, k: int, total: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """(t, s) [count]: t from LCM's grid k - 1, 2k - 1, ..., T - 1, and s = t - k, never below 0."""
    t = torch.tensor([k * rng.randint(1, total // k) - 1 for _ in range(count)])
    return t, (t - k).clamp_min(0)


def consistency(x: Tensor, noise: Tensor, t: Tensor, schedule: NoiseSchedule, scheduler: LCMScheduler) -> Tensor:
    """f(x, t) = c_skip x + c_out (x - sigma_t e) / a_t, [B, 4, h, w]; f(x, 0) = x."""
    c_skip, c_out = (c.view(-1, 1, 1, 1) for c in scheduler.get_scalings_for_boundary_condition_discrete(t))
    a, sigma = schedule(t)
    return c_skip * x + c_out * (x - sigma * noise) / a


@torch.no_grad()
def guided_step(
    unet: Any, x_t: Tensor, t: Tensor, s: Tensor, batch: Batch, w: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """x^_s: one DDIM step of the frozen U-Net with e_cfg = w e(c_p) + (1 - w) e(""); w [B] may differ by row."""
    e_cfg = Teacher(unet, 0.0)(x_t, t, batch.positive, batch.empty, w)
    return ddim_update(x_t, e_cfg, t, s, schedule)


def train_lcm_lora(config: LcmLoraConfig) -> Path:
    """Train and write ``pytorch_lora_weights.safetensors`` with a card into ``run.output``; returns that folder."""
    config.check()
    pipe = load_frozen(config.model)
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.unet.train()
    torch.manual_seed(config.run.seed)
    rank = config.rank or like_sun(pipe.unet, config.targets)
    lora = LoraStudent(pipe.unet, rank, config.targets)
    run = start_run(config, {"lora": lora})
    work = Distillation(config, pipe, run)
    if config.skipping_step > work.total:
        raise ConfigError(f"skipping_step is at most the model's {work.total} timesteps.")
    scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    student = run.modules["lora"]
    for _ in run.steps():
        x_t, t, positive, target = new_targets(config, work, lora, scheduler)
        with run.accelerator.autocast():
            predicted = consistency(x_t, student(x_t, t, positive), t, work.schedule, scheduler)
        difference = predicted - target
        errors = difference.square() if config.loss == "l2" else pseudo_huber(difference, config.huber_c)
        run.update(errors.mean())
        if run.time_to_sample():
            save_lora(work, lora, rank)
            work.sample_grid(lora, scheduler)
    save_lora(work, lora, rank)
    work.sample_grid(lora, scheduler)
    return run.folder


@torch.no_grad()
def new_targets(
    config: LcmLoraConfig, work: Distillation, student: LoraStudent, scheduler: LCMScheduler
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_t, t, text states, f_theta-(x^_s, s)) of a new batch."""
    run, schedule, batch = work.run, work.schedule, work.batch()
    t, s = (k.to(work.device) for k in draw_timesteps(len(batch.x0), config.skipping_step, work.total, run.rng))
    w_high = config.guidance_scale_max or config.guidance_scale
    w = torch.tensor([run.rng.uniform(config.guidance_scale, w_high) for _ in t], device=work.device)
    noise = torch.randn_like(batch.x0)
    x_t = add_noise(batch.x0, noise, t, schedule)
    if config.pure_noise_at_start:
        x_t = torch.where((t == work.total - 1).view(-1, 1, 1, 1), noise, x_t)
    # Autocast keeps its low-precision copies of trained weights until the context ends: the averaged weights need a
    # context of their own, or the student would go on with the copies of theirs.
    with run.averaged(), run.accelerator.autocast():
        with student.without_lora() as unet:
            x_s = guided_step(unet, x_t, t, s, batch, w, schedule)
        target = consistency(x_s, student(x_s, s, batch.positive), s, schedule, scheduler)
    return x_t, t, batch.positive, target


def save_lora(work: Distillation, student: LoraStudent, rank: int) -> None:
    """Write the averaged LoRA in fp16, in the format ``pipe.load_lora_weights`` reads, with its card."""
    state = work.run.averaged_state("lora")
    if not work.run.accelerator.is_main_process:
        return
    StableDiffusionPipeline.save_lora_weights(work.run.folder, unet_lora_layers=student.file(state))
    count = sum(weight.numel() for weight in state.values())
    work.write_card("LCM-LoRA", USAGE, {"method": "LCM-LoRA", "rank": rank, "parameters": count})
