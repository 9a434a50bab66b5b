"""Puts a SUN adapter into ComfyUI's sampling without touching the model.

Nothing is patched while nothing is sampled. `apply` hangs three wrappers on a clone of the model:

    OUTER_SAMPLE     once a run     gives each positive conditioning the negative text as one more tensor, so that
                                    ComfyUI itself batches and moves it; drops everything when the run ends
    APPLY_MODEL      each forward   finds the adapter of the patcher that runs now, the negatives in force at this
                                    sigma, and the adapter's K and V of both texts, computed at the first step
    DIFFUSION_MODEL  each forward   innermost of all wrappers, so that a call which another node answers itself is not
                                    counted: puts SUN's attention on top of whatever holds the attn2 slots by then

Binding this late makes the order of nodes irrelevant: an IP-Adapter added before or after finds a free slot, and its
attention is called from inside ours. Weights stay out of `model_options`, which ComfyUI copies at every clone. Only
DIFFUSION_MODEL lies inside a compiled U-Net, so what changes from step to step is settled before it.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP

from ..sun.adapter import SunAdapter
from ..sun.attention import sun_attention
from ..sun.conditioning import AdapterTexts, repeated_in_turn
from ..sun.kept import Interval, Negative, SunRun
from ..sun.layers import AttentionLayer
from . import checks, merging, notices
from .loading import LoadedAdapter, check_base, fitted, load_adapter
from .wrapping import UNetCall, Wrapper, around_unet, hang, innermost

__all__ = ["KEY", "LoadedAdapter", "SunSettings", "apply", "load_adapter", "settings_of"]

log = logging.getLogger(__name__)

KEY = "sun"
NEGATIVE = "sun_negative_{}"
WHOLE_RUN = (0.0, 1.0)


@dataclass(frozen=True)
class SunSettings:
    """What Apply SUN to Model remembers. `negative` is a CONDITIONING, or None: then the sampler's counts.

    effect: between which shares (0 to 1) of the way from noise to picture SUN acts. guidance: w of an adapter that
    takes it, or None: the adapter's own.
    """

    name: str
    strength: float
    negative: list | None
    layers: tuple[AttentionLayer, ...]
    effect: tuple[float, float] = WHOLE_RUN
    guidance: float | None = None


def interval(sampling: Any, start: float = 0.0, end: float = 1.0) -> Interval:
    """Sigmas between two shares of the way from noise (0) to picture (1), as ComfyUI's nodes count them."""
    return Interval(
        float("inf") if start <= 0.0 else float(sampling.percent_to_sigma(start)),
        0.0 if end >= 1.0 else float(sampling.percent_to_sigma(end)),
    )


class RunReport(NamedTuple):
    """What happened in a run of so many steps. `calls`: of the U-Net, those alone that reached it; `answered`: those
    that another node answered. `negative_tokens`: of each negative entry."""

    calls: int
    seconds: float
    layers: int
    negative_tokens: tuple[int, ...]
    steps: int
    answered: int = 0

    def __str__(self) -> str:
        calls = f"{self.calls} U-Net call{'' if self.calls == 1 else 's'}"
        if self.answered:
            calls += f" ({self.answered} more answered without it)"
        elif self.calls < self.steps:
            calls += f" in {self.steps} steps"
        tokens = " + ".join(map(str, self.negative_tokens)) or "0"
        return f"{calls}, {self.seconds:.1f} s, {self.layers} layers, negative {tokens} tokens"


@dataclass
class PlainForward:
    """One call of the U-Net in a run with SUN, without SUN in it: for the unguided picture, or outside its effect."""

    ran: bool = False


@dataclass
class SunForward:
    """One call of the U-Net. `negatives` and `positive`, of which `texts` were made, have a row for each of the batch,
    as it was then; `prior` is the attention others put in; `layer_text` what attn2 patches of others left to the layer
    that runs now, if there are any."""

    adapter: SunAdapter
    layers: tuple[AttentionLayer, ...]
    strength: float
    guidance: torch.Tensor | None
    negatives: list[tuple[float, torch.Tensor]]
    positive: torch.Tensor | None
    texts: AdapterTexts
    prior: dict[int, Callable] = field(default_factory=dict)
    layer_text: torch.Tensor | None = None
    ran: bool = False

    def of_text(self, make: Callable[..., Any], text: torch.Tensor | None, rows: int) -> Any:
        """What the adapter, or a layer of it, makes of another positive text for so many rows."""
        negatives = [(weight, repeated_in_turn(negative, rows)) for weight, negative in self.negatives]
        return make(negatives, text, strength=self.strength, guidance=self.guidance)


# --------------------------------------------------------------------------------------------------------- applying


def apply(
    model: comfy.model_patcher.ModelPatcher,
    loaded: LoadedAdapter,
    strength: float = 1.0,
    negative: list | None = None,
    effect: tuple[float, float] = WHOLE_RUN,
    guidance: float | None = None,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` that samples with the adapter. A SUN already on the model is replaced, never added to.

    Raises SunFileError if the adapter does not fit the model, ValueError for an effect that ends before it starts or
    a guidance scale that the adapter does not take.
    """
    loaded = fitted(model, loaded)
    layers = check_base(model, loaded)
    checks.check_effect(effect)
    adapter: SunAdapter = loaded.patcher.model
    adapter.guidance(guidance)  # says so now if the adapter cannot
    if note := adapter.guidance_note(guidance):
        log.warning("SUN: %s", note)
    patched = model.clone()
    if patched.get_attachment(KEY) is not None:
        log.warning("SUN: the model had a SUN adapter already; %s takes its place.", loaded.name)
    patched.set_attachments(KEY, SunSettings(loaded.name, float(strength), negative, layers, effect, guidance))
    patched.set_additional_models(KEY, [loaded.patcher])
    merging.speak_up(patched)
    around: dict[str, Wrapper] = {
        WrappersMP.OUTER_SAMPLE: _outer_sample,
        WrappersMP.APPLY_MODEL: _apply_model,
        WrappersMP.DIFFUSION_MODEL: _diffusion_model,
    }
    hang(patched, KEY, around)
    return patched


def settings_of(model: comfy.model_patcher.ModelPatcher) -> SunSettings | None:
    """The SUN on a model, or None."""
    return model.get_attachment(KEY)


# ------------------------------------------------------------------------------------------------------ the wrappers


def _outer_sample(
    executor: Any,
    noise: torch.Tensor,
    latent: torch.Tensor,
    sampler: Any,
    sigmas: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    guider = executor.class_obj
    settings = settings_of(guider.model_patcher)
    if settings is None:
        return executor(noise, latent, sampler, sigmas, *args, **kwargs)

    run = SunRun(settings.strength, settings.guidance, layers=settings.layers)
    tokens: tuple[int, ...] = ()
    if settings.strength != 0.0:
        checks.check_run(guider, sampler, sigmas, latent)
        run, tokens = _begin(guider, settings)
    # model_options is this run's own copy, dropped by ComfyUI when the run ends, whatever ends it.
    guider.model_options["transformer_options"][KEY] = run
    began = time.perf_counter()
    try:
        output = executor(noise, latent, sampler, sigmas, *args, **kwargs)
    finally:
        run.end()
    if output.is_cuda:
        torch.cuda.synchronize(output.device)  # else the seconds would be those of the queueing
    layers = len(settings.layers) if tokens else 0
    report = RunReport(run.calls, time.perf_counter() - began, layers, tokens, len(sigmas) - 1, run.answered)
    guider.sun_report = report
    log.info("SUN: %s", report)
    checks.check_report(guider, report.steps, report.calls, report.answered)
    notices.tell(notices.running_node(), "ran", line=str(report))
    return output


def _begin(guider: Any, settings: SunSettings) -> tuple[SunRun, tuple[int, ...]]:
    """The run, and the tokens of each negative entry. The negatives are put into the positive conditionings."""
    texts, entries = _negatives(guider, settings)
    conds = {NEGATIVE.format(i): comfy.conds.CONDCrossAttn(text) for i, text in enumerate(texts)}
    for group, members in guider.conds.items():  # guider.conds is this run's own copy
        if group != "negative":
            for cond in members:
                cond["model_conds"] = {**cond.get("model_conds", {}), **conds}
    wanted = getattr(guider, "sun_effect", WHOLE_RUN)
    start, end = max(settings.effect[0], wanted[0]), min(settings.effect[1], wanted[1])
    if start >= end:
        log.warning("SUN acts nowhere: the percents of Apply SUN to Model and of the sampler do not meet.")
    effect = interval(guider.model_patcher.get_model_object("model_sampling"), start, end)
    tokens = tuple(text.shape[1] for text in texts)
    log.info(
        "SUN active: %d layers, negative %s tokens, strength %g, adapter %s",
        len(settings.layers),
        " + ".join(map(str, tokens)),
        settings.strength,
        settings.name,
    )
    return SunRun(settings.strength, settings.guidance, entries, effect, settings.layers), tokens


def _negatives(guider: Any, settings: SunSettings) -> tuple[list[torch.Tensor], tuple[Negative, ...]]:
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

    sampling = guider.model_patcher.get_model_object("model_sampling")
    entries = tuple(
        Negative(
            weight=float(cond.get("strength", 1.0)),
            when=interval(
                sampling,
                max(cond.get("start_percent", 0.0), cond.get("clip_start_percent", 0.0)),  # the latter by CLIP hooks
                min(cond.get("end_percent", 1.0), cond.get("clip_end_percent", 1.0)),
            ),
        )
        for cond in conds
    )
    return texts, entries


def _apply_model(
    executor: Any,
    x: torch.Tensor,
    t: torch.Tensor,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    options = transformer_options or {}
    run = options.get(KEY)
    negatives: list[torch.Tensor] = []
    while (name := NEGATIVE.format(len(negatives))) in kwargs:
        negatives.append(kwargs.pop(name))
    forward: SunForward | PlainForward = PlainForward()
    if isinstance(run, SunRun):
        weights = run.weights(t) if negatives and c_crossattn is not None else {}
        # Looked up by the patcher that runs: with several GPUs each has its own copy of the adapter.
        patchers = executor.class_obj.current_patcher.get_additional_models_with_key(KEY)
        if weights and patchers:
            c_crossattn, *negatives = (_cast(text, executor.class_obj, x) for text in (c_crossattn, *negatives))
            chosen = [(weight, repeated_in_turn(negatives[i], x.shape[0])) for i, weight in weights.items()]
            adapter: SunAdapter = patchers[0].model
            guidance = adapter.guidance(run.guidance)
            texts = run.texts(adapter, chosen, c_crossattn, guidance=guidance, key=_which(options, x.device))
            forward = SunForward(adapter, run.layers, run.strength, guidance, chosen, c_crossattn, texts)
        wrappers = innermost(options.get("wrappers", {}), WrappersMP.DIFFUSION_MODEL, KEY)
        options = {**options, KEY: forward, "wrappers": wrappers}
    output = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    if isinstance(run, SunRun):
        run.calls += forward.ran
        run.answered += not forward.ran
    return output


def _cast(text: torch.Tensor, model: Any, x: torch.Tensor) -> torch.Tensor:
    """As BaseModel casts the text for the U-Net right after this."""
    dtype = model.get_dtype() if model.manual_cast_dtype is None else model.manual_cast_dtype
    return comfy.model_management.cast_to_device(text, x.device, dtype)


def _which(options: dict[str, Any], device: torch.device) -> tuple[Any, ...]:
    """Names the conditionings of this call among the run's."""
    return (*options.get("uuids", ()), str(device))


@around_unet
def _diffusion_model(call: UNetCall) -> torch.Tensor:
    forward = call.options.get(KEY)
    if isinstance(forward, (SunForward, PlainForward)):
        forward.ran = True
    if not isinstance(forward, SunForward):
        return call.go_on()

    if call.context is not forward.positive:  # another node changed it on the way here
        forward.texts = forward.of_text(forward.adapter.texts, call.context, call.x.shape[0])
        forward.positive = call.context
    replace = call.options.get("patches_replace", {})
    attn2 = dict(replace.get("attn2", {}))
    for position, layer in enumerate(forward.layers):
        prior = attn2.get(layer.comfy, attn2.get(layer.comfy[:2]))
        if prior is not None:
            forward.prior[position] = prior
        attn2[layer.comfy] = attn2_of(position)  # ComfyUI asks for (block, id, depth) before (block, id)
    patches = call.options.get("patches", {})
    call.options = {**call.options, "patches_replace": {**replace, "attn2": attn2}}
    if patches.get("attn2_patch"):  # regional prompters: each layer gets its texts, and more rows, from them
        call.options["patches"] = {**patches, "attn2_patch": [*patches["attn2_patch"], remember_text]}
    return call.go_on()


def remember_text(
    n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The last attn2 patch: remembers the text [B, L, width] that those before it left to the layer."""
    extra[KEY].layer_text = context
    return n, context, value


# ----------------------------------------------------------------------------------------------------- the attention


@functools.cache  # the same object at every step: a compiled model would recompile for a new one
def attn2_of(position: int) -> Callable[..., torch.Tensor]:
    """The attn2 replacement for the adapter's layer at `position`: (q, k, v, extra_options) -> Z before to_out."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        forward: SunForward = extra[KEY]
        heads = extra["n_heads"]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
            return optimized_attention(
                q, k, v, heads, attn_precision=extra.get("attn_precision"), transformer_options=extra
            )

        z_p = attend(q, k, v, heads)
        texts = forward.texts.layers[position]
        if forward.layer_text is not None and forward.layer_text is not forward.positive:
            texts = forward.of_text(forward.adapter.layers[position].texts, forward.layer_text, q.shape[0])
        z = sun_attention(q, z_p, texts, heads, attend)
        prior = forward.prior.get(position)
        return z if prior is None else prior(q, k, v, extra) + (z - z_p)

    return attention
