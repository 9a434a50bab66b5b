"""Memory and arithmetic of SUN training computed on any machine, by running the step on tensors without content."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from ...common.devices import AUTO
from ...pipelines.attach import attach
from ...surgery import from_unet
from ..algorithm import NoiseSchedule, step_noise, teacher_rollout
from ..config import DTYPES, RunConfig, SunTrainConfig
from ..student import Student, Teacher
from .benchmark import GIB, Models, freeze, random_batch, random_sd15, settings_of


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors alive (``now``) and the most there were at once (``peak``)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: Any = WeakIdKeyDictionary()

    def add_module(self, module: nn.Module) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        return result


def estimate(config: SunTrainConfig, make: Callable[[], Models] = random_sd15) -> dict[str, Any]:
    """Peak memory and arithmetic of one process, computed by running the step on tensors without content.

    ``memory_gib`` counts every tensor alive at the worst moment; the device's runtime and the allocator need about
    1 GiB more. ``tflop_per_picture`` is the arithmetic of one picture of training: a device's sustained TFLOP/s
    divided by it gives pictures a second. The rows that MSC replaces add about p to it, and are left out.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        parts = made_in(config.run.frozen, make)
        freeze(config, parts)
        adapter = from_unet(parts.unet, positive=config.positive_branch, dtype=torch.float32)
        adapter.to = lambda *_, **__: adapter  # type: ignore[method-assign]  # torch cannot "move" such tensors either
        attach(parts.unet, adapter.train())
        frozen = [parts.unet, parts.text_encoder, *([] if config.cache else [parts.vae])]
        student = Student(parts.unet, adapter)
        cost = step_cost(config.run, frozen, adapter, lambda: _loss_of_first_stage(config, parts, student))
    return {**cost, **settings_of(config, "sd15", counted_precision(config.run))}


def made_in(frozen: str, make: Callable[[], Models]) -> Models:
    """Models made in a number format, since tensors without content cannot be converted."""
    torch.set_default_dtype(DTYPES[frozen])
    try:
        return make()
    finally:
        torch.set_default_dtype(torch.float32)


def counted_precision(run: RunConfig) -> str:
    """The number format that is counted with: of a card that has bf16, where the settings leave it open."""
    return "bf16" if run.precision == AUTO else run.precision


def step_cost(
    run: RunConfig, frozen: Sequence[nn.Module], trained: nn.Module, loss_of: Callable[[], Tensor]
) -> dict[str, Any]:
    """``memory_gib``, ``trained_parameters`` and ``tflop_per_picture`` of a step, within FakeTensorMode.

    frozen, trained: the modules in memory. loss_of: the loss of a batch, in autocast.
    """
    memory, flops = LiveMemory(), FlopCounterMode(display=False, custom_mapping=cpu_attention())
    for module in (*frozen, trained):
        memory.add_module(module)
    # The CPU's autocast stands for both half formats: each takes 2 bytes.
    cast = torch.autocast("cpu", torch.bfloat16, enabled=counted_precision(run) != "fp32")
    with memory, flops:
        held = _optimizer_state(run, trained)
        with cast:
            loss = loss_of()
        loss.backward()
        del held
    return {
        "measured": False,
        "memory_gib": round(memory.peak / GIB, 3),
        "trained_parameters": sum(p.numel() for p in trained.parameters()),
        "tflop_per_picture": round(flops.get_total_flops() / run.batch_size / 1e12, 6),
    }


def _optimizer_state(run: RunConfig, module: nn.Module) -> list[Tensor]:
    """What AdamW (two moments, of one byte each for 8bit) and EMA keep for each parameter."""
    moment = torch.uint8 if run.optimizer == "8bit" else torch.float32
    kinds = [moment, moment] + [torch.float32] * bool(run.ema_decay)
    return [torch.zeros_like(p, dtype=kind) for p in module.parameters() for kind in kinds]


def _loss_of_first_stage(config: SunTrainConfig, parts: Models, student: nn.Module) -> Tensor:
    """The loss at t = T - 1 without replaced rows: ``stage_targets`` picks rows by content, which is not there."""
    x, text = random_batch(config, parts, torch.device("cpu"))
    positive, negative = text.chunk(2)
    schedule, teacher = NoiseSchedule(parts.alphas), Teacher(parts.unet, config.guidance_scale)
    total = schedule.num_train_timesteps
    t = torch.full((len(x),), total - 1)
    s = t - round(config.stage_length * total)
    with torch.no_grad():
        x_s, e_cfg = teacher_rollout(x, t, s, config.substeps, lambda x, k: teacher(x, k, positive, negative), schedule)
        e_step = step_noise(x_s, x, t, s, schedule)
    predicted = student(x, t, positive, negative)
    return nn.functional.mse_loss(predicted, e_cfg) + nn.functional.mse_loss(predicted, e_step)


def cpu_attention() -> dict[Any, Any]:
    """FLOP counts of the CPU's attention kernel, which torch's counter does not know: two matrix products."""

    def forward(query: Any, key: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        batch, heads, tokens, width = query
        return 2 * 2 * batch * heads * tokens * key[-2] * width

    def backward(grad: Any, query: Any, key: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 5 * forward(query, key) // 2  # five products instead of two

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
