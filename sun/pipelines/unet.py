"""SUN on a diffusers U-Net: the attention processors, and the hook that makes K and V of the texts for each call."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from einops import rearrange
from torch import Tensor, nn

from ..adapter import SunAdapter
from ..attention import attend, sun_attention
from ..common.notes import note
from ..conditioning import AdapterTexts, repeated_side_by_side
from ..files import DTYPES
from ..kept import SunRun, autocast_dtype

NEGATIVE = "sun_negative"
"""In cross_attention_kwargs: the negative text's states [B or 1, L, text_width]; inside the U-Net, what the adapter
made of both texts."""
GUIDANCE = "sun_guidance"
RUN = "sun_run"
UNET_ARGUMENTS = tuple(inspect.signature(UNet2DConditionModel.forward).parameters)[1:]
# All compute the same attention, by different kernels; ours replaces any of them.
PLAIN_PROCESSORS = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
REPLACED = (
    "The attention processors of this U-Net were replaced after sun.attach (attention slicing, xformers, fused "
    "projections and IP-Adapters do that), so SUN would do nothing. Make that change first, then call sun.attach "
    "again; IP-Adapter and SUN cannot be combined."
)
LEFT_OUT = (
    "SUN did nothing in this call of the U-Net: sun.attach put an adapter on a pipeline of it, and something else "
    "calls it, without a negative for SUN. For another pipeline made of the same parts (from_pipe, components) call "
    "sun.attach on that one too; to use the plain U-Net, call sun.detach first."
)


@dataclass(eq=False)
class Steering:
    """What one user of a U-Net attached: a pipeline, or whoever calls the bare U-Net."""

    adapter: SunAdapter
    strength: float = 1.0
    guidance_scale: float | None = None
    by_pipeline: bool = False

    def run(self, guidance_scale: Any = None) -> DiffusersRun:
        """A new run. guidance_scale: w for it, instead of the one that was attached."""
        wanted = self.guidance_scale if guidance_scale is None else guidance_scale
        return DiffusersRun(self.strength, wanted, steering=self)


@dataclass(eq=False)
class DiffusersRun(SunRun):
    """A run that knows what acts in it. ``plain_calls``: calls of the U-Net that gave SUN no negative."""

    steering: Steering | None = None
    plain_calls: int = 0


CURRENT: ContextVar[DiffusersRun | None] = ContextVar("sun_run", default=None)
"""The run of the pipeline that is being called in this thread or task."""


def new_run(unet: Any) -> DiffusersRun:
    """A run for many calls of a bare U-Net with the same texts, as ``cross_attention_kwargs={"sun_run": run, ...}``.

    K and V are then computed once. Call ``run.end()`` when the texts are no longer needed. Raises ValueError if the
    U-Net has no adapter.
    """
    attachment = attachment_of(unet)
    if attachment is None:
        raise ValueError("This U-Net has no SUN adapter. Call sun.attach(unet, adapter) first.")
    return attachment.bare.run()


def attachment_of(unet: Any) -> UNetAttachment | None:
    """What ``attach`` installed on a U-Net, looking through torch.compile's wrapper."""
    found: UNetAttachment | None = getattr(unet, "_orig_mod", unet).__dict__.get("_sun")
    return found


class SunAttnProcessor:
    """Cross-attention with SUN: Z = Zp - g(Zn) [+ g'(Ze)], then the layer's own ``to_out`` (Eq. 6)."""

    def __init__(self, position: int, prior: Any) -> None:
        self.position, self.prior = position, prior

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sun_negative: AdapterTexts | None = None,
    ) -> Tensor:
        if sun_negative is None or encoder_hidden_states is None:
            return self.prior(attn, hidden_states, encoder_hidden_states, attention_mask)
        query, z_p = frozen_attention(attn, hidden_states, encoder_hidden_states, attention_mask)
        z = sun_attention(query, z_p, sun_negative.layers[self.position], attn.heads)
        return attn.to_out[1](attn.to_out[0](z))


def frozen_attention(
    attn: Any, hidden_states: Tensor, text: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(query, Zp) [B, T, C] of a layer's own attention over ``text`` [B, L, D], before ``to_out``."""
    mask = None
    if attention_mask is not None:
        rows, tokens = text.shape[:2]
        mask = attn.prepare_attention_mask(attention_mask, tokens, rows)
        mask = rearrange(mask, "(b h) t l -> b h t l", h=attn.heads)
    query = attn.to_q(hidden_states)
    return query, attend(query, attn.to_k(text), attn.to_v(text), attn.heads, mask)


def check_attention(name: str, attention: Any) -> None:
    """Raise ValueError, naming the layer and what to do, unless it is a plain cross-attention of SD 1.x."""
    processor = attention.processor
    prior = processor.prior if isinstance(processor, SunAttnProcessor) else processor
    if type(prior) not in PLAIN_PROCESSORS:
        raise ValueError(
            f"{name} uses {type(prior).__name__}, which SUN cannot be combined with. Unload the IP-Adapter or other "
            "feature that set it (pipe.unload_ip_adapter(), pipe.unfuse_qkv_projections()), then call sun.attach again."
        )
    extras = (
        "spatial_norm",
        "group_norm",
        "norm_q",
        "norm_k",
        "norm_cross",
        "added_kv_proj_dim",
        "residual_connection",
    )
    found = [extra for extra in extras if getattr(attention, extra, None)]
    if found or attention.rescale_output_factor != 1.0:
        raise ValueError(f"{name} is not Stable Diffusion 1.x's cross-attention ({', '.join(found)}). SUN needs that.")


@dataclass(eq=False)
class UNetAttachment:
    """What is installed on a U-Net. Each of its users, pipelines or bare callers, has an adapter of its own."""

    unet: Any
    attentions: tuple[Any, ...]
    """The modules attn2, in the adapter's order."""
    processors: tuple[SunAttnProcessor, ...]
    users: list[Steering] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    wrappers: list[Any] = field(default_factory=list)

    @classmethod
    def install(cls, unet: Any, attentions: Sequence[Any]) -> UNetAttachment:
        processors = tuple(SunAttnProcessor(i, attention.processor) for i, attention in enumerate(attentions))
        attachment = cls(unet, tuple(attentions), processors)
        attachment.renew()
        attachment.hooks.append(unet.register_forward_pre_hook(before_call, with_kwargs=True))
        attachment.hooks += keep_from_self_attention(unet, NEGATIVE)
        unet._sun = attachment
        return attachment

    def renew(self) -> None:
        """Put the processors in, on top of what someone may have put there since."""
        for attention, own in zip(self.attentions, self.processors, strict=True):
            if attention.processor is not own:
                there = attention.processor
                own.prior = there.prior if isinstance(there, SunAttnProcessor) else there
                attention.processor = own

    @property
    def bare(self) -> Steering:
        """What acts in calls that belong to no pipeline: what was attached to the U-Net itself, else the latest."""
        return next((user for user in self.users if not user.by_pipeline), self.users[-1])

    def add(self, user: Steering) -> None:
        """Let ``user`` call the U-Net with SUN; its adapter moves to where the U-Net is."""
        device = None if self.unet.device.type == "meta" else self.unet.device
        dtype = None if user.adapter.training or self.unet.dtype not in DTYPES else self.unet.dtype
        user.adapter.to(device=device, dtype=dtype)
        if not user.by_pipeline:  # it takes the place of the bare callers' earlier one
            self.users = [other for other in self.users if other.by_pipeline]
        self.users.append(user)

    def drop(self, user: Steering) -> None:
        """The opposite of ``add``; with its last user the attachment goes."""
        self.users = [other for other in self.users if other is not user]
        if not self.users:
            self.remove()

    def watch(self, module: Any) -> None:
        """Make K and V before torch.compile's wrapper around the U-Net, so that none are made in its graph."""
        if module is not self.unet and not any(module is known for known in self.wrappers):
            self.wrappers.append(module)
            self.hooks.append(module.register_forward_pre_hook(before_call, with_kwargs=True))

    def remove(self) -> None:
        for attention, processor in zip(self.attentions, self.processors, strict=True):
            if attention.processor is processor:  # else someone replaced it since; theirs stays
                attention.processor = processor.prior
        for hook in self.hooks:
            hook.remove()
        self.users = []
        if self.unet.__dict__.get("_sun") is self:
            del self.unet._sun

    def in_place(self) -> bool:
        return all(a.processor is own for a, own in zip(self.attentions, self.processors, strict=True))


def before_call(
    unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: what the adapter makes of both texts takes the place of the negative's states.

    Every other argument stays as it was passed, by position or by name.
    """
    given = dict(zip(UNET_ARGUMENTS, args, strict=False)) | kwargs
    options = given.get("cross_attention_kwargs") or {}
    negative, attachment = options.get(NEGATIVE), attachment_of(unet)
    if attachment is None or isinstance(negative, AdapterTexts):
        return None
    if negative is None:
        _note_plain_call(attachment)
        if RUN not in options:
            return None
        made = None
    else:
        made = _texts(attachment, given, options)
    options = {key: value for key, value in options.items() if key not in (NEGATIVE, GUIDANCE, RUN)}
    options[NEGATIVE] = made
    position = UNET_ARGUMENTS.index("cross_attention_kwargs")
    if len(args) > position:
        return (*args[:position], options, *args[position + 1 :]), kwargs
    return args, {**kwargs, "cross_attention_kwargs": options}


def _texts(attachment: UNetAttachment, given: dict[str, Any], options: dict[str, Any]) -> AdapterTexts | None:
    """What the adapter makes of the texts of a call, None at strength 0. given: the call's arguments by name."""
    if not attachment.in_place():
        raise RuntimeError(REPLACED)
    positive: Tensor = given["encoder_hidden_states"]
    run: DiffusersRun = options.get(RUN) or attachment.bare.run()
    steering = run.steering or attachment.bare
    adapter = steering.adapter
    negative = fit_negative(options[NEGATIVE], positive, adapter.text_width)
    wanted = options.get(GUIDANCE)
    guidance = adapter.guidance(run.guidance if wanted is None else wanted)
    if guidance is not None and len(guidance) > 1:
        guidance = repeated_side_by_side(guidance, len(negative), GUIDANCE)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        run.calls += 1
    if run.strength == 0.0:
        return None
    dtype = _follow(adapter, positive)
    texts, mask = [(1.0, negative.to(dtype))], _score_mask(given)
    positive = positive.to(dtype)
    if compiling:  # the hook is in the graph, where nothing can be kept
        return adapter.texts(texts, positive, strength=run.strength, positive_mask=mask, guidance=guidance)
    return run.texts(adapter, texts, positive, mask=mask, guidance=guidance)


def _follow(adapter: SunAdapter, text: Tensor) -> torch.dtype:
    """Move the adapter to where the U-Net computes now (offloading, ``pipe.to``) and return its dtype."""
    first = adapter.sun_layers()[0].alpha_neg
    wanted = first.dtype
    if not adapter.training and autocast_dtype(text.device.type) is None and text.dtype in DTYPES:
        wanted = text.dtype
    if any((layer.alpha_neg.device, layer.alpha_neg.dtype) != (text.device, wanted) for layer in adapter.sun_layers()):
        adapter.to(device=text.device, dtype=wanted)
    return wanted


def _score_mask(given: dict[str, Any]) -> Tensor | None:
    """encoder_attention_mask [B, L] as the U-Net adds it to the scores: [B, 1, 1, L]."""
    mask: Tensor | None = given.get("encoder_attention_mask")
    if mask is None:
        return None
    return rearrange((1 - mask.to(given["sample"].dtype)) * -10000.0, "b l -> b 1 1 l")


def _note_plain_call(attachment: UNetAttachment) -> None:
    """Count a call without a negative for the pipeline that runs; where none runs that knows of SUN, say so."""
    if torch.compiler.is_compiling():
        return
    run = CURRENT.get()
    if run is not None and run.steering in attachment.users:
        run.plain_calls += 1
    elif all(user.by_pipeline for user in attachment.users):
        note(LEFT_OUT)


def fit_negative(negative: Any, positive: Tensor, text_width: int, name: str = NEGATIVE) -> Tensor:
    """Return negative embeddings with the rows, device and dtype of the positive ones [B, L, text_width].

    One row serves the whole batch; n rows serve B / n neighbouring images each, the order in which diffusers lays out
    several images a prompt. Raises TypeError or ValueError, saying what to pass as ``name``.
    """
    if not isinstance(negative, Tensor) or not negative.is_floating_point():
        kind = str(negative.dtype) if isinstance(negative, Tensor) else type(negative).__name__
        raise TypeError(f"{name} must be text embeddings, a floating-point tensor [B, L, {text_width}], not {kind}.")
    if negative.ndim != 3 or negative.shape[-1] != text_width:
        raise ValueError(
            f"{name} has shape {list(negative.shape)}; the U-Net needs text embeddings [B, L, {text_width}]. "
            "Encode the negative prompt with the text encoder of this model."
        )
    return repeated_side_by_side(negative.to(device=positive.device, dtype=positive.dtype), positive.shape[0], name)


@dataclass(frozen=True)
class _Without:
    """Forward pre-hook that takes options away."""

    names: tuple[str, ...]

    def __call__(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self.names[0] not in kwargs:
            return None
        return args, {key: value for key, value in kwargs.items() if key not in self.names}


def keep_from_self_attention(unet: Any, *names: str) -> list[Any]:
    """Hook every self-attention so that it does not get the options ``names``, of which diffusers would warn there.

    Returns the hooks' handles.
    """
    layers = [module for name, module in unet.named_modules() if name.endswith(".attn1")]
    return [module.register_forward_pre_hook(_Without(names), with_kwargs=True) for module in layers]
