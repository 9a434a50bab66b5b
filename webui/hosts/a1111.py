"""A1111's way into cross-attention: torch hooks on three Linear layers of each `attn2`.

Every attention implementation of the host, and every extension that replaces `CrossAttention.forward`, still calls
`to_q`, `to_k` and the Linear in `to_out`. Hooks on them need no forward replaced and leave when their handle does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from modules import shared

from ..run import UNCONDITIONAL, WebuiRun, batch_was_changed

log = logging.getLogger(__name__)

SKIP = "skip_early_cond"
SKIP_INFOTEXT = "Skip Early CFG"


@dataclass
class Batch:
    """Which image each row of a step paints. The host may call the U-Net for some rows at a time."""

    weights: list[list[float]] = field(default_factory=list)
    """The AND sub-prompts of each image."""
    layout: list[int] = field(default_factory=list)
    """Of all rows of a step; tiled sampling runs through it once a tile."""
    row: int = 0
    images: list[int] = field(default_factory=list)
    """Of the rows of the U-Net call that runs now."""

    def begin(self, rows: int) -> None:
        size = len(self.layout)
        first = self.row % max(size, 1)
        if not size or (rows % size and first + rows > size):
            raise batch_was_changed(rows, size)
        self.images = [self.layout[(first + i) % size] for i in range(rows)]
        self.row += rows


_batches: dict[int, Batch] = {}


def unet_of(sd_model: Any) -> torch.nn.Module:
    return sd_model.model.diffusion_model


def prediction_of(sd_model: Any) -> str:
    """What the model predicts, by diffusers' names."""
    said = getattr(sd_model, "parameterization", "eps")
    return {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}.get(said, str(said))


def sigma_at(sd_model: Any) -> None:
    return None  # its ControlNet extension counts steps


@contextmanager
def kept_beside(p: Any, unet: torch.nn.Module) -> Iterator[None]:
    unet.to(next(unet_of(p.sd_model).parameters()).device)
    try:
        yield
    finally:
        if getattr(shared.cmd_opts, "lowvram", False) or getattr(shared.cmd_opts, "medvram", False):
            unet.to("cpu")


def patches_weights(sd_model: Any) -> bool:
    return False  # LoRAs are in every Linear and convolution of a name they know, the small U-Net's too


@contextmanager
def sampling(run: WebuiRun, p: Any) -> Iterator[None]:
    unet = unet_of(p.sd_model)
    small = getattr(getattr(p, "sun_switching", None), "small", None)
    batch = _batches[id(run)] = Batch()
    with ExitStack() as stack:
        stack.callback(_batches.pop, id(run))
        stack.enter_context(one_call_a_step(p))

        def begin(_module: Any, args: tuple[Any, ...]) -> None:
            if run.error is not None:
                raise run.error
            batch.begin(args[0].shape[0])

        positions = {layer.ldm: position for position, layer in enumerate(run.layers)}
        hooked = {unet: positions}
        if small is not None:  # a layer of it has what the adapter has for the layer that it is like
            hooked[small.unet] = {own: positions[like] for own, like in small.attentions().items() if like in positions}
        for one, places in hooked.items():
            stack.callback(one.register_forward_pre_hook(begin).remove)
            for name, position in places.items():
                for handle in _hook(one.get_submodule(name), position, run, batch):
                    stack.callback(handle.remove)
        yield


def _hook(attn2: Any, position: int, run: WebuiRun, batch: Batch) -> list[Any]:
    """Hooks that take the query and the text of one layer and change its attention output before `to_out`."""
    seen: dict[str, torch.Tensor] = {}

    def query(_module: Any, _args: Any, output: torch.Tensor) -> None:
        seen["query"] = output

    def text(_module: Any, args: tuple[Any, ...]) -> None:
        seen["text"] = args[0]

    def output(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if "query" not in seen or "text" not in seen:
            return None
        z_p, q = args[0], seen.pop("query")
        z = run.change(position, q, z_p.to(q.dtype), seen.pop("text"), attn2.heads, batch.images)
        return (z.to(z_p.dtype), *args[1:])

    return [
        attn2.to_q.register_forward_hook(query),
        attn2.to_k.register_forward_pre_hook(text),
        attn2.to_out[0].register_forward_pre_hook(output),
    ]


@contextmanager
def one_call_a_step(p: Any) -> Iterator[None]:
    """Makes the host leave out the unconditional prompt, which it evaluates at CFG 1 too.

    Its option for the first part of a run does it for all of it; infinity, because some samplers take more steps than
    they say. The attribute hides the option while the run lasts: its value proper, which the host may write to its
    settings file in the middle of a run, is not touched. Nor does it stay in the infotext: pasted back, it would be set
    for pictures without SUN.
    """
    if SKIP not in shared.opts.data_labels:
        log.warning("SUN: this host calls the U-Net twice a step. Update it to A1111 1.10 or newer for full speed.")
        yield
        return
    hidden, written = vars(shared.opts), p.extra_generation_params.get(SKIP_INFOTEXT)
    hidden[SKIP] = math.inf
    try:
        yield
    finally:
        hidden.pop(SKIP, None)
        p.extra_generation_params.pop(SKIP_INFOTEXT, None)
        if written is not None:
            p.extra_generation_params[SKIP_INFOTEXT] = written


def before_step(run: WebuiRun, params: Any) -> None:
    """Notes which image each row of the step paints, and keeps the host from preparing unconditional rows."""
    batch = _batches[id(run)]
    prompts = params.denoiser.sampler.sampler_extra_args["cond"].batch
    batch.weights = [[part.weight for part in parts] for parts in prompts]
    conditional = [image for image, parts in enumerate(prompts) for _ in parts]
    batch.layout, batch.row = conditional, 0
    if SKIP not in shared.opts.data_labels:
        batch.layout += [UNCONDITIONAL] * (params.x.shape[0] - len(conditional))
    else:
        # The host cuts x and sigma to the conditional rows but not this one: an inpainting model would fail on it.
        params.image_cond = params.image_cond[: len(conditional)]
        # Never evaluated; of the positive's length, so that "pad prompt" options leave the positive as it is.
        if isinstance(params.text_cond, torch.Tensor):
            params.text_uncond = params.text_cond[:1].expand(len(prompts), -1, -1)


def after_step(run: WebuiRun, params: Any) -> None:
    """Averages the predictions of AND sub-prompts by weight.

    The host computes u + sum w_i (c_i - u) with the first prediction in the place of u, which would drop the first
    sub-prompt. With the average in its place the sum is the average.
    """
    batch = _batches[id(run)]
    if all(len(weights) == 1 for weights in batch.weights) or SKIP not in shared.opts.data_labels:
        return
    start, parts = 0, sum(len(weights) for weights in batch.weights)
    for image, weights in enumerate(batch.weights):
        total = sum(weights)
        if total:
            rows = params.x[start : start + len(weights)]
            shares = torch.tensor(weights, device=rows.device, dtype=rows.dtype).view(-1, 1, 1, 1) / total
            params.x[parts + image] = (rows * shares).sum(0)
        start += len(weights)
