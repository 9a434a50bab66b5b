"""What a candidate costs and what it matters: seconds of its modules, change of the noise without it."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..common.devices import synchronize
from .assembly import assemble
from .planfile import Plan
from .structure import CompactError, Shape, candidates


@dataclass(frozen=True)
class State:
    """What a U-Net was given in one step of a real trajectory: x [B, C, h, w], t [B] or one number, text [B, L, D].

    added: SDXL's ``added_cond_kwargs``, else empty.
    """

    x: Tensor
    t: Tensor
    text: Tensor
    added: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def noise_of(unet: Any, state: State) -> Tensor:
    """The U-Net's output [B, C, h, w] in float32."""
    added = {"added_cond_kwargs": state.added} if state.added else {}
    output: Tensor = unet(state.x, state.t, state.text, return_dict=False, **added)[0]
    return output.float()


def importances(unet: Any, shape: Shape, states: Sequence[State], sets: Iterable[tuple[str, ...]]) -> list[float]:
    """For each set of candidates: mean squared change of the noise without it, over the noise's mean square.

    ``unet`` is a diffusers U-Net of ``shape``, in evaluation mode; nothing is copied. Raises CompactError for states
    that do not fit or give no finite number.
    """
    for state in states:
        _check_fit(shape, state)
    full = [_finite(noise_of(unet, state), "the original") for state in states]
    scale = sum(float(f.square().mean()) for f in full)
    if states and scale == 0:
        raise CompactError("On these states the original predicts nothing but zeros. Give a trained U-Net.")
    found = []
    for names in sets:
        small = assemble(unet, Plan(names, shape), share=True)
        without = [_finite(noise_of(small, state), f"the U-Net without {', '.join(names)}") for state in states]
        changes = [float((noise - f).square().mean()) for noise, f in zip(without, full, strict=True)]
        found.append(sum(changes) / scale)
    return found


def _check_fit(shape: Shape, state: State) -> None:
    names = ("channels of latents", "width of texts", "size and pooled text")
    found = (state.x.shape[1], state.text.shape[-1], bool(state.added))
    for name, theirs, own in zip(names, found, (shape.channels[0], shape.text_width, bool(shape.added)), strict=True):
        if theirs != own:
            raise CompactError(
                f"These states are of another U-Net: {name} {theirs} there, {own} here. Record states of this model."
            )


def _finite(noise: Tensor, what: str) -> Tensor:
    if not bool(noise.isfinite().all()):
        raise CompactError(
            f"On these states {what} gives NaN or infinity. Use float32 or bfloat16, and states of finite numbers."
        )
    return noise


def random_state(unet: Any, height: int, width: int, batch: int = 1, tokens: int = 77) -> State:
    """Noise of the U-Net's own input shape, for measuring seconds. height and width: of the latents."""
    config, parameter = unet.config, next(unet.parameters())
    made = {"device": parameter.device, "dtype": parameter.dtype}
    text = config.cross_attention_dim
    text = text[0] if isinstance(text, (list, tuple)) else text
    added = {}
    if config.get("addition_embed_type") == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.zeros(batch, pooled, **made), "time_ids": torch.zeros(batch, 6, **made)}
    x = torch.randn(batch, config.in_channels, height, width, **made)
    return State(x, torch.tensor(500, device=parameter.device), torch.randn(batch, tokens, text, **made), added)


def part_seconds(unet: Any, shape: Shape, state: State, repeats: int = 3) -> dict[str, float]:
    """Median seconds of one call (``whole``) and of what each candidate runs in it, after one call to warm up.

    repeats: calls the medians are over. The modules are timed inside whole calls, so one run gives all candidates.
    """
    timer = _Timer(unet, state.x.device)
    runs: list[dict[str, float]] = []
    try:
        for _ in range(repeats + 1):
            timer.times.clear()
            whole = _seconds(lambda: noise_of(unet, state), state.x.device)
            runs.append({**timer.times, "whole": whole})
    finally:
        timer.remove()
    medians = {name: statistics.median(run[name] for run in runs[1:]) for name in runs[0]}
    found = {name: sum(medians.get(m, 0.0) for m in modules_of(name, unet, shape)) for name in candidates(shape)}
    return {"whole": medians["whole"], **found}


def call_seconds(unets: Sequence[Any], state: State, repeats: int = 3) -> list[float]:
    """Median seconds of a call of each, taking turns in one process after one call each to warm up."""
    runs: list[list[float]] = [[] for _ in unets]
    for number in range(repeats + 1):
        for unet, times in zip(unets, runs, strict=True):
            seconds = _seconds(lambda unet=unet: noise_of(unet, state), state.x.device)  # type: ignore[misc]
            times += [seconds] if number else []
    return [statistics.median(times) for times in runs]


def modules_of(name: str, unet: Any, shape: Shape) -> list[str]:
    """Names in the U-Net of the modules that a candidate removes."""
    kind, _, rest = name.partition(".")
    stage, _, number = rest.partition(".")
    last = shape.stages - 1
    if kind == "mid":
        return ["mid_block"]
    if kind == "innermost":
        return [f"down_blocks.{last}", f"down_blocks.{last - 1}.downsamplers.0", "mid_block", "up_blocks.0"]
    s, n = int(stage), int(number or 0)
    up = last - s
    if kind == "pair":
        places = [f"down_blocks.{s}.{{}}.{n}", f"up_blocks.{up}.{{}}.{shape.layers[s] - n}"]
        kinds = ["resnets"] + ["attentions"] * bool(shape.depths[s])
        return [place.format(kind) for place in places for kind in kinds]
    every = [f"down_blocks.{s}.attentions.{j}" for j in range(shape.layers[s])]
    every += [f"up_blocks.{up}.attentions.{j}" for j in range(shape.layers[s] + 1)]
    if kind == "transformers":
        return every
    every += ["mid_block.attentions.0"] * (s == last and shape.mid_depth >= 0)
    return [f"{place}.transformer_blocks.{b}" for place in every for b in range(n, shape.depths[s])]


_TIMED = re.compile(
    r"mid_block|(down|up)_blocks\.\d+|(down|up)_blocks\.\d+\.(resnets|attentions|downsamplers)\.\d+"
    r"|(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+"
)


class _Timer:
    """Seconds of a U-Net's stages, layers and transformer blocks, by hooks around them."""

    def __init__(self, unet: nn.Module, device: torch.device) -> None:
        self.times: dict[str, float] = {}
        self._hooks: list[Any] = []
        for name, module in unet.named_modules():
            if _TIMED.fullmatch(name):
                self._watch(name, module, device)

    def _watch(self, name: str, module: nn.Module, device: torch.device) -> None:
        began: list[float] = []

        def before(*_: Any) -> None:
            began.append(_now(device))

        def after(*_: Any) -> None:
            self.times[name] = _now(device) - began.pop()

        self._hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    began = _now(device)
    call()
    return _now(device) - began


def described(state: State, repeats: int) -> dict[str, Any]:
    """At which size and on what seconds were measured, for a plan."""
    device = state.x.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    batch, _, height, width = state.x.shape
    return {
        "batch": batch,
        "latents": [height, width],
        "dtype": str(state.x.dtype).removeprefix("torch."),
        "device": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "repeats": repeats,
    }
