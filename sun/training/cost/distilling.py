"""Memory and arithmetic of ``sun train-compact`` computed on any machine, as :mod:`.estimate` does for SUN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...compact.attaching import experts_for, mixing_of
from ...compact.planfile import Plan, read_plan
from ...compact.structure import named_list, new_config, shape_of
from ..compact.settings import CompactTrainConfig, is_list
from ..compact.stages import Watcher, feature_loss
from .benchmark import Models, random_sd15
from .estimate import counted_precision, made_in, step_cost


def estimate_compact(config: CompactTrainConfig, make: Callable[[], Models] = random_sd15) -> dict[str, Any]:
    """Peak memory and arithmetic of one process distilling, the dearest part: the whole compact U-Net trains.

    ``memory_gib`` counts every tensor alive at the worst moment; the device's runtime and the allocator need about
    1 GiB more. ``tflop_per_picture`` is the arithmetic of one picture: a device's sustained TFLOP/s divided by it gives
    pictures a second. What the teacher draws where there are no pictures comes on top (``teacher_steps`` calls of two
    rows, over ``target_reuse``). Raises CompactError for a list SD 1.5 has not, and for a plan of another U-Net.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        parts = made_in(config.run.frozen, make)
        parts.unet.requires_grad_(False).eval()
        shape = shape_of(parts.unet.config)
        plan = Plan(named_list(config.plan, shape), shape) if is_list(config.plan) else read_plan(config.plan)
        plan.check(shape, "Stable Diffusion 1.5's, of which this is computed")
        settings = {**new_config(dict(parts.unet.config), plan.kept), "_use_default_values": []}
        small = type(parts.unet).from_config(settings).train()
        if config.gradient_checkpointing:
            small.enable_gradient_checkpointing()
        trained = nn.ModuleList([small])
        if config.experts:
            experts = experts_for(parts.unet, small, plan, config.experts, config.router_width)
            mixing_of(small, experts)
            trained.append(experts)
        frozen = [parts.unet, parts.text_encoder, *([] if config.cache else [parts.vae])]
        cost = step_cost(config.run, frozen, trained, lambda: _loss(config, parts, small))
    return {
        **cost,
        "plan": config.plan,
        "experts": config.experts,
        "batch_size": config.run.batch_size,
        "accumulate": config.run.accumulate,
        "precision": counted_precision(config.run),
        "frozen": config.run.frozen,
        "optimizer": config.run.optimizer,
        "resolution": config.resolution,
        "gradient_checkpointing": config.gradient_checkpointing,
        "torch": torch.__version__,
    }


def _loss(config: CompactTrainConfig, parts: Models, small: nn.Module) -> Tensor:
    """The three losses of one batch; text and pictures are random, and really encoded where they are not cached."""
    count, side = config.run.batch_size, (config.resolution or 512) // 8
    teacher, student = Watcher(parts.unet), Watcher(small)
    with torch.no_grad():
        x = torch.randn(count, 4, side, side)
        if not config.cache:
            parts.vae.encode(torch.randn(count, 3, side * 8, side * 8))
        text = parts.text_encoder(torch.zeros(count, 77, dtype=torch.long))[0]
        t = torch.full((count,), 500)
        target = parts.unet(x, t, text).sample.float()
    predicted = small(x, t, text).sample.float()
    errors = nn.functional.mse_loss(predicted, target) + nn.functional.mse_loss(predicted, torch.randn_like(x))
    return errors + feature_loss(student.take(), teacher.take())
