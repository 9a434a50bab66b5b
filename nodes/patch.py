"""Puts a SUN adapter into ComfyUI's sampling without touching the model.

Nothing is patched while nothing is sampled. `apply` hangs three wrappers on a clone of the model:

    OUTER_SAMPLE     once a run     gives each positive conditioning the negative text as one more tensor, so that
                                    ComfyUI itself batches, casts and moves it
    APPLY_MODEL      each forward   finds the adapter of the patcher that runs now, and the negatives in force at this
                                    sigma
    DIFFUSION_MODEL  each forward   puts SUN's attention on top of whatever holds the attn2 slots at that moment

Binding this late makes the order of nodes irrelevant: an IP-Adapter added before or after finds a free slot, and its
attention is called from inside ours. Weights stay out of `model_options`, which ComfyUI copies at every clone.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sampler_helpers
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP

from ..sun.adapter import SunAdapter
from ..sun.files import SunFileError
from ..sun.layers import AttentionLayer, layers_of_ldm

log = logging.getLogger(__name__)

KEY = "sun"
NEGATIVE = "sun_negative_{}"


class LoadedAdapter(NamedTuple):
    """What travels on a SUN_ADAPTER link: a readable name and the weights under ComfyUI's model management."""

    name: str
    patcher: comfy.model_patcher.ModelPatcher

    @property
    def adapter(self) -> SunAdapter:
        return self.patcher.model


@dataclass(frozen=True)
class SunSettings:
    """What Apply SUN to Model remembers. `negative` is a CONDITIONING, or None: then the sampler's counts."""

    name: str
    strength: float
    negative: list | None
    layers: tuple[AttentionLayer, ...]


class NegativeEntry(NamedTuple):
    """One entry of the negative conditioning: its weight and the sigmas between which it is in force."""

    weight: float
    sigma_start: float
    sigma_end: float

    def active(self, sigma: float) -> bool:
        return self.sigma_end <= sigma <= self.sigma_start


@dataclass(frozen=True)
class SunRun:
    """One sampling run: the settings and the negatives, whose tensors travel in the conditioning under NEGATIVE."""

    settings: SunSettings
    entries: tuple[NegativeEntry, ...]


@dataclass
class SunForward:
    """One call of the U-Net. `negatives` holds (weight, text [B, L, width]); `prior` the attention others put in."""

    adapter: SunAdapter
    settings: SunSettings
    active: dict[int, float]
    negatives: list[tuple[float, torch.Tensor]] = field(default_factory=list)
    positive: torch.Tensor | None = None
    prior: dict[int, Callable] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------- loading and applying


def load_adapter(path: Path | str, name: str | None = None, **_: Any) -> LoadedAdapter:
    """Reads an adapter file and hands it to ComfyUI's model management. Raises SunFileError."""
    adapter = SunAdapter.load(path, linear=comfy.ops.manual_cast.Linear)
    adapter.eval().requires_grad_(False)
    return LoadedAdapter(name or Path(path).name, _patcher(adapter, path))


def _patcher(adapter: SunAdapter, path: Path | str) -> comfy.model_patcher.ModelPatcher:
    patcher = comfy.model_patcher.ModelPatcher(
        adapter,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    # ComfyUI with several GPUs builds one copy per device through this (since 0.23).
    patcher.cached_patcher_init = (lambda file, **_: load_adapter(file).patcher, (str(path),))
    return patcher


def layers_of(model: comfy.model_patcher.ModelPatcher) -> tuple[AttentionLayer, ...]:
    """The cross-attention layers of a ComfyUI model; empty for a model without an SD-like U-Net."""
    unet = getattr(model.model, "diffusion_model", None)
    if unet is None or not hasattr(unet, "input_blocks"):
        return ()
    return tuple(layers_of_ldm(unet))


def check_base(model: comfy.model_patcher.ModelPatcher, loaded: LoadedAdapter) -> tuple[AttentionLayer, ...]:
    """The model's layers if the adapter fits it. Raises SunFileError that names both sides and what to do."""
    kind = type(model.model.model_config).__name__
    layers = layers_of(model)
    if not layers:
        raise SunFileError(
            f"SUN works on Stable Diffusion 1.x models, and this one ({kind}) has no U-Net with cross-attention. "
            f"Connect an SD 1.5 checkpoint, or the model of Load Emoji Diffusion."
        )
    width = model.model.model_config.unet_config.get("context_dim")
    loaded.adapter.check_base([layer.channels for layer in layers], width, where=f"this {kind} model")
    return layers


def apply(
    model: comfy.model_patcher.ModelPatcher, loaded: LoadedAdapter, strength: float = 1.0, negative: list | None = None
) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` that samples with the adapter. A SUN already on the model is replaced, never added to."""
    layers = check_base(model, loaded)
    patched = model.clone()
    if patched.get_attachment(KEY) is not None:
        log.warning("SUN: the model had a SUN adapter already; %s takes its place.", loaded.name)
    patched.set_attachments(KEY, SunSettings(loaded.name, float(strength), negative, layers))
    patched.set_additional_models(KEY, [loaded.patcher])
    for wrapper_type, wrapper in (
        (WrappersMP.OUTER_SAMPLE, _outer_sample),
        (WrappersMP.APPLY_MODEL, _apply_model),
        (WrappersMP.DIFFUSION_MODEL, _diffusion_model),
    ):
        patched.remove_wrappers_with_key(wrapper_type, KEY)
        patched.add_wrapper_with_key(wrapper_type, KEY, wrapper)
    return patched


def settings_of(model: comfy.model_patcher.ModelPatcher) -> SunSettings | None:
    """The SUN on a model, or None."""
    return model.get_attachment(KEY)


# ------------------------------------------------------------------------------------------------------ the wrappers


def _outer_sample(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    guider = executor.class_obj
    settings: SunSettings | None = guider.model_patcher.get_attachment(KEY)
    if settings is None or settings.strength == 0:
        return executor(*args, **kwargs)

    texts, entries = _negatives(guider, settings)
    conds = {NEGATIVE.format(i): comfy.conds.CONDCrossAttn(text) for i, text in enumerate(texts)}
    for group, members in guider.conds.items():  # guider.conds is this run's own copy
        if group != "negative":
            for cond in members:
                cond["model_conds"] = {**cond.get("model_conds", {}), **conds}
    # model_options is this run's own copy too, dropped by ComfyUI when the run ends, whatever ends it.
    guider.model_options["transformer_options"][KEY] = SunRun(settings, entries)

    log.info(
        "SUN active: %d layers, negative %s tokens, strength %g, adapter %s",
        len(settings.layers), " + ".join(str(text.shape[1]) for text in texts), settings.strength, settings.name,
    )  # fmt: skip
    cfg = getattr(guider, "cfg", 1.0)
    if abs(cfg - 1.0) > 1e-6:
        log.warning(
            "SUN: cfg is %g, so each step costs two U-Net calls and the guidance counts twice. "
            "SUN has the guidance in its weights: set cfg to 1.0.", cfg,
        )  # fmt: skip
    return executor(*args, **kwargs)


def _negatives(guider: Any, settings: SunSettings) -> tuple[list[torch.Tensor], tuple[NegativeEntry, ...]]:
    """Texts [B, L, width] and entries of the negative prompt: Apply SUN's own, else the guider's."""
    if settings.negative is not None:
        conds = comfy.sampler_helpers.convert_cond(settings.negative)
    else:
        conds = guider.conds.get("negative") or []
    conds = [cond for cond in conds if cond.get("cross_attn") is not None]
    if not conds:
        raise ValueError(
            "SUN needs a negative prompt and found none. Connect a CLIP Text Encode (it may be empty) to the negative "
            "input of the sampler, or, for guiders that have none, to the negative input of Apply SUN to Model."
        )

    width = guider.model_patcher.model.model_config.unet_config["context_dim"]
    texts = [cond["cross_attn"] for cond in conds]
    for text in texts:
        if text.shape[-1] != width:
            raise ValueError(
                f"The negative prompt is {text.shape[-1]} wide and this model's text is {width} wide. "
                f"Encode the negative prompt with the CLIP that belongs to the model."
            )
    if any("area" in cond or "mask" in cond for cond in conds):
        log.warning("SUN: the negative prompt acts on the whole picture; its area or mask is ignored.")

    to_sigma = guider.model_patcher.get_model_object("model_sampling").percent_to_sigma
    entries = tuple(
        NegativeEntry(
            weight=float(cond.get("strength", 1.0)),
            sigma_start=to_sigma(cond["start_percent"]) if "start_percent" in cond else float("inf"),
            sigma_end=to_sigma(cond["end_percent"]) if "end_percent" in cond else 0.0,
        )
        for cond in conds
    )
    return texts, entries


def _apply_model(
    executor: Any, x: torch.Tensor, t: torch.Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
    transformer_options: dict[str, Any] | None = None, **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    options = transformer_options or {}
    run = options.get(KEY)
    # Looked up by the patcher that runs: with several GPUs each has its own copy of the adapter.
    patchers = executor.class_obj.current_patcher.get_additional_models_with_key(KEY)
    if isinstance(run, SunRun) and patchers:
        options = {**options, KEY: SunForward(patchers[0].model, run.settings, _weights(run.entries, t))}
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def _weights(entries: tuple[NegativeEntry, ...], sigma: torch.Tensor) -> dict[int, float]:
    """Weights, adding up to 1, of the negative entries in force at this sigma [B]."""
    limited = any(entry.sigma_end > 0 or entry.sigma_start != float("inf") for entry in entries)
    now = float(sigma.flatten()[0]) if limited else None  # reading sigma waits for the device: only where it matters
    weights = {i: entry.weight for i, entry in enumerate(entries) if now is None or entry.active(now)}
    total = sum(weights.values())
    return {i: weight / total for i, weight in weights.items()} if total > 0 else {}


def _diffusion_model(
    executor: Any, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor | None = None, y: Any = None,
    control: Any = None, transformer_options: dict[str, Any] | None = None, **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    options = transformer_options if transformer_options is not None else {}
    forward = options.get(KEY)
    texts: dict[int, torch.Tensor] = {}
    while (name := NEGATIVE.format(len(texts))) in kwargs:
        texts[len(texts)] = kwargs.pop(name)
    if not isinstance(forward, SunForward) or not texts or not forward.active:
        return executor(x, timesteps, context, y, control, options, **kwargs)

    forward.negatives = [(weight, _rows(texts[i], x.shape[0])) for i, weight in forward.active.items()]
    forward.positive = context
    replace = options.get("patches_replace", {})
    attn2 = dict(replace.get("attn2", {}))
    for position, layer in enumerate(forward.settings.layers):
        prior = attn2.get(layer.comfy, attn2.get(layer.comfy[:2]))
        if prior is not None:
            forward.prior[position] = prior
        attn2[layer.comfy] = sun_attention(position)  # ComfyUI asks for (block, id, depth) before (block, id)
    options = {**options, "patches_replace": {**replace, "attn2": attn2}}
    return executor(x, timesteps, context, y, control, options, **kwargs)


def _rows(text: torch.Tensor, rows: int) -> torch.Tensor:
    """The negative text with one row per row of the U-Net's batch; nodes that tile a picture change the batch late."""
    if text.shape[0] == rows:
        return text
    if text.shape[0] == 1:
        return text.expand(rows, -1, -1)
    if rows % text.shape[0] == 0:
        return text.repeat(rows // text.shape[0], 1, 1)
    raise ValueError(
        f"SUN: another node changed the batch to {rows} rows, which the {text.shape[0]} rows of the negative prompt do "
        f"not divide. Use a batch size of 1 with that node."
    )


# ----------------------------------------------------------------------------------------------------- the attention


@functools.cache  # the same object at every step: a compiled model would recompile for a new one
def sun_attention(position: int) -> Callable[..., torch.Tensor]:
    """The attn2 replacement for the adapter's layer at `position`: (q, k, v, extra_options) -> Z before to_out."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        forward: SunForward = extra[KEY]
        heads = extra["n_heads"]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
            return optimized_attention(
                q, k, v, heads, attn_precision=extra.get("attn_precision"), transformer_options=extra
            )

        layer = forward.adapter.layers[position]
        z_p = attend(q, k, v, heads)
        outputs = [
            (
                weight,
                layer(q, z_p, text, forward.positive, heads=heads, strength=forward.settings.strength, attend=attend),
            )
            for weight, text in forward.negatives
        ]
        z = outputs[0][1] if len(outputs) == 1 else sum(weight * z for weight, z in outputs)
        prior = forward.prior.get(position)
        return z if prior is None else prior(q, k, v, extra) + (z - z_p)

    return attention
