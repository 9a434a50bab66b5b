"""Forge's way into cross-attention (Forge, reForge, Forge Classic): late binding by a conditioning modifier.

The modifier runs at every step and lays SUN over whatever holds the attn2 slots then. Nothing sits in a slot between
the steps, so an IP-Adapter finds it free, before or after.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...sun.attention import Attend
from ..run import UNCONDITIONAL, WebuiRun, batch_was_changed

TEXT = "sun_text"
KERNELS = (("backend.attention", "attention_function"), ("ldm_patched.ldm.modules.attention", "optimized_attention"))


def unet_of(sd_model: Any) -> torch.nn.Module:
    return sd_model.forge_objects.unet.model.diffusion_model


def prediction_of(sd_model: Any) -> str:
    """What the model predicts, by diffusers' names: Forge's predictor says it, in reForge and Classic a type."""
    model = sd_model.forge_objects.unet.model
    said = getattr(getattr(model, "predictor", None), "prediction_type", None)
    if said is None:
        said = getattr(getattr(model, "model_type", None), "name", "EPS").lower()
    return {"eps": "epsilon"}.get(said, str(said))


def sigma_at(sd_model: Any) -> Callable[[float], float] | None:
    model = sd_model.forge_objects.unet.model
    levels = getattr(model, "predictor", None) or getattr(model, "model_sampling", None)  # the latter in the others
    return getattr(levels, "percent_to_sigma", None)


@contextmanager
def kept_beside(p: Any, unet: torch.nn.Module) -> Iterator[None]:
    objects = p.sd_model.forge_objects
    before = objects.unet
    add = getattr(before, "add_extra_torch_module_during_sampling", None)
    if add is None:  # no host known; then as A1111 has it
        unet.to(next(unet_of(p.sd_model).parameters()).device)
        yield
        return
    patched = before.clone()
    patched.add_extra_torch_module_during_sampling(unet, cast_to_unet_dtype=False)
    objects.unet = patched
    try:
        yield
    finally:
        if objects.unet is patched:
            objects.unet = before


def patches_weights(sd_model: Any) -> bool:
    unet = sd_model.forge_objects.unet
    return bool(getattr(unet, "lora_patches", None) or getattr(unet, "patches", None))


@contextmanager
def sampling(run: WebuiRun, p: Any) -> Iterator[None]:
    objects = p.sd_model.forge_objects
    before = objects.unet
    patched = before.clone()
    patched.add_conditioning_modifier(modifier(run, host_attention()))
    objects.unet = patched
    try:
        yield
    finally:
        if objects.unet is patched:
            objects.unet = before


def host_attention() -> Attend:
    """The host's attention kernel, (q, k, v, heads) -> out; a user may have chosen xformers or SageAttention."""
    for module, name in KERNELS:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise RuntimeError("SUN: this version of Forge keeps its attention elsewhere. Please report it with its version.")


def modifier(run: WebuiRun, kernel: Attend) -> Callable[..., tuple[Any, ...]]:
    """A conditioning modifier. A plain closure: the host deep-copies its options, and a method would copy weights."""

    def modify(
        model: Any, x: Any, timestep: Any, uncond: Any, cond: Any, _scale: Any, model_options: dict[str, Any], seed: Any
    ) -> tuple[Any, ...]:
        if run.error is not None:
            raise run.error
        options = dict(model_options)
        transformer = dict(options.get("transformer_options", {}))
        patches = dict(transformer.get("patches", {}))
        patches["attn2_patch"] = [*patches.get("attn2_patch", []), remember_text]  # last: sees what others made of it
        replace = dict(transformer.get("patches_replace", {}))
        attn2 = dict(replace.get("attn2", {}))
        for position, layer in enumerate(run.layers):
            prior = attn2.get(layer.comfy, attn2.get(layer.comfy[:2]))
            attn2[layer.comfy] = replacement(run, position, kernel, prior)  # asked for before (block, id)
        transformer |= {"patches": patches, "patches_replace": {**replace, "attn2": attn2}}
        options["transformer_options"] = transformer
        # At scale 1 the host leaves the unconditional prompt out, the second pass of hires fix included.
        return model, x, timestep, uncond, averaged(cond), 1.0, options, seed

    return modify


def averaged(cond: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """AND sub-prompts with weights that add up to 1: without an unconditional prediction the host would multiply the
    picture by their sum."""
    total = sum(part.get("strength", 1.0) for part in cond)
    if not total or abs(total - 1.0) < 1e-6:
        return cond
    return [{**part, "strength": part.get("strength", 1.0) / total} for part in cond]


def remember_text(n: Any, context: Any, value: Any, extra: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Keeps the positive text before its projection; the replacement that runs next gets only K and V."""
    extra[TEXT] = context
    return n, context, value


def replacement(run: WebuiRun, position: int, kernel: Attend, prior: Callable[..., Any] | None) -> Callable[..., Any]:
    """The attn2 replacement of one layer: (q, k, v, extra_options) -> Z before to_out."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        heads = extra["n_heads"]
        z_p = kernel(q, k, v, heads)
        z = run.change(position, q, z_p, extra.get(TEXT), heads, rows_of(extra, q.shape[0], run.images), kernel)
        return z if prior is None else prior(q, k, v, extra) + (z - z_p)

    return attention


def rows_of(extra: dict[str, Any], rows: int, images: int) -> list[int]:
    """Which of `images` each row paints: the host stacks one batch a sub-prompt, and unconditional ones where something
    (perturbed attention, say) asks for them; tiled sampling stacks all of that once a tile."""
    chunks = extra.get("cond_or_uncond") or [0]
    layout = [image if chunk == 0 else UNCONDITIONAL for chunk in chunks for image in range(images)]
    tiles, rest = divmod(rows, max(len(layout), 1))  # outside of a step there are no images, which `change` tells
    if rest:
        raise batch_was_changed(rows, len(layout))
    return layout * tiles


def before_step(run: WebuiRun, params: Any) -> None:
    """Nothing: the rows of a call are known only inside it."""


def after_step(run: WebuiRun, params: Any) -> None:
    """Nothing: `averaged` did it before the step."""
