"""SUN in diffusers: ``attach`` puts an adapter on a pipeline or a bare U-Net, ``detach`` takes it off again.

The negative text reaches the layers as ``cross_attention_kwargs={"sun_negative": embeds}``; nothing about a run is
kept on the U-Net. A pipeline becomes an instance of a subclass of its own class that encodes the negative prompt,
hands it over that way and never runs classifier-free guidance.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import nn

from ..adapter import SunAdapter, SunLayer
from ..attention import attend
from ..common.notes import note
from ..conditioning import AdapterTexts, RunTexts
from ..files import DTYPES
from ..layers import layers_of_unet
from ..prediction import check_prediction
from .layered import put_on, take_off
from .schedulers import make_scheduler, prediction_of

NEGATIVE = "sun_negative"
GUIDANCE = "sun_guidance"
TEXTS = "sun_texts"
SUPPORTED_PIPELINES: tuple[Any, ...] = (
    StableDiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
)
# All compute the same attention, by different kernels; ours replaces any of them.
PLAIN_PROCESSORS = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
UNET_ARGUMENTS = tuple(inspect.signature(UNet2DConditionModel.forward).parameters)[1:]


def attach(
    target: Any,
    adapter: SunAdapter | str | os.PathLike[str],
    strength: float = 1.0,
    *,
    final_sigma_zero: bool = True,
    guidance_scale: float | None = None,
) -> None:
    """Put a SUN adapter on a diffusers pipeline or a bare ``UNet2DConditionModel``, replacing one put there before.

    A pipeline then takes ``prompt`` and ``negative_prompt`` as always and calls its U-Net once a step, whatever its
    ``guidance_scale``. Its scheduler becomes DDIM on SUN's trailing timesteps; assign another to ``pipe.scheduler``
    afterwards if you like. A bare U-Net takes the negative text embeddings [B or 1, L, text_width] through
    ``cross_attention_kwargs={"sun_negative": embeds}`` and without them behaves as before; fewer rows than the batch
    are repeated, each for as many neighbouring images. Who calls a bare U-Net many times with the same texts may hand
    over ``"sun_texts": sun.pipelines.attach.texts_for(unet, negative, positive)`` with them, as pipelines do for each
    run: the adapter's K and V are then not computed at every call.

    adapter: a ``SunAdapter`` or a file. It is moved to the U-Net's device and, unless it is in training mode, dtype.
    strength: 1 is the trained adapter, 0 the plain conditional U-Net bit for bit.
    guidance_scale: for adapters that take one, w instead of the scale they were made for. A pipeline's own
    ``guidance_scale`` argument goes before it; for a bare U-Net, so does ``cross_attention_kwargs={"sun_guidance": w}``
    (a number, or a tensor [B]).
    final_sigma_zero: end at sigma 0, as other hosts do; False keeps the pipeline's own setting of ``set_alpha_to_one``
    (Stable Diffusion 1.5 ends at sigma 0.029).

    Pipelines may share a U-Net; each is attached by itself, with the same adapter and strength. LoRAs may be loaded
    before or after. ``save_pretrained`` writes the pipeline without SUN. IP-Adapter and other custom attention
    processors are not supported and refused.

    A model that predicts v is told of by a warning: adapters are trained on models that predict the noise.

    Raises SunFileError if the file is unusable or made for another base model, TypeError or ValueError if the target
    is not a Stable Diffusion 1.x pipeline or U-Net, or predicts what cannot be sampled.
    """
    pipe, unet = _pipeline_and_unet(target)
    if not isinstance(adapter, SunAdapter):
        adapter = SunAdapter.load(adapter)
    layers = layers_of_unet(unet)
    adapter.guidance(guidance_scale)  # says so now if the adapter cannot
    adapter.check_base([la.channels for la in layers], unet.config.cross_attention_dim, _describe(unet))
    modules = {layer.diffusers: unet.get_submodule(layer.diffusers) for layer in layers}
    for name, attention in modules.items():
        _check_attention(name, attention)
    scheduler = None if pipe is None else _trailing_ddim(pipe, final_sigma_zero)
    if scheduler is not None and (said := check_prediction(*prediction_of(scheduler.config))):
        note(said)

    # nothing can fail from here on: what was attached before makes way
    shared = getattr(unet, "_sun", None)
    if pipe is None or shared is None or not shared.matches(adapter, strength, guidance_scale):
        detach(unet)
    if pipe is not None:
        detach(pipe)
    if getattr(unet, "_sun", None) is None:
        unet._sun = _UNetAttachment.install(unet, adapter, strength, guidance_scale, modules)
    if pipe is not None:
        unet._sun.pipelines += 1
        pipe._sun = _PipelineAttachment(pipe.scheduler, unet._sun)
        put_on(pipe, _sun_class)
        pipe.scheduler = scheduler


def detach(target: Any) -> None:
    """Take the adapter off and restore class, scheduler and attention processors; without one, do nothing.

    Detaching a U-Net that pipelines share detaches it for all of them.
    """
    pipe, unet = _pipeline_and_unet(target)
    if pipe is None:
        if (attachment := getattr(unet, "_sun", None)) is not None:
            attachment.remove()
        return
    state = pipe.__dict__.get("_sun")
    if state is None:
        return
    del pipe._sun
    take_off(pipe, _sun_class)
    pipe.scheduler = state.original_scheduler
    state.attachment.pipelines -= 1
    if state.attachment.pipelines == 0:
        state.attachment.remove()


# --- the U-Net ---------------------------------------------------------------------------------------------------


def frozen_attention(
    attn: Any, hidden_states: torch.Tensor, text: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(query, Zp, mask) of a layer's own attention over ``text`` [B, L, D], before ``to_out``: query and Zp [B, T, C],
    the mask over the text's tokens [B, heads, 1 or T, L]."""
    mask = None
    if attention_mask is not None:
        rows, tokens = text.shape[:2]
        mask = attn.prepare_attention_mask(attention_mask, tokens, rows).unflatten(0, (rows, attn.heads))
    query = attn.to_q(hidden_states)
    return query, attend(query, attn.to_k(text), attn.to_v(text), attn.heads, mask), mask


class SunAttnProcessor:
    """Cross-attention with SUN: Z = Zp - g(Zn) [+ g'(Ze)], then the layer's own ``to_out`` (Eq. 6)."""

    def __init__(self, layer: SunLayer, position: int, strength: float, prior: Any) -> None:
        self.layer, self.position, self.strength, self.prior = layer, position, strength, prior

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        sun_negative: torch.Tensor | None = None,
        sun_guidance: torch.Tensor | None = None,
        sun_texts: AdapterTexts | None = None,
    ) -> torch.Tensor:
        if sun_negative is None or encoder_hidden_states is None or self.strength == 0.0:
            return self.prior(attn, hidden_states, encoder_hidden_states, attention_mask)
        query, z_p, mask = frozen_attention(attn, hidden_states, encoder_hidden_states, attention_mask)
        if sun_texts is not None and mask is None:
            z = self.layer(query, z_p, heads=attn.heads, texts=sun_texts.layers[self.position])
        else:
            weight_dtype = self._follow(query)
            z = self.layer(
                query,
                z_p,
                sun_negative.to(weight_dtype),
                encoder_hidden_states.to(weight_dtype),
                heads=attn.heads,
                strength=self.strength,
                positive_mask=mask,
                guidance=sun_guidance,
            )
        return attn.to_out[1](attn.to_out[0](z))

    def _follow(self, query: torch.Tensor) -> torch.dtype:
        """Move the layer to where the U-Net computes now (offloading, ``pipe.to``) and return its dtype."""
        weight = self.layer.alpha_neg
        wanted = weight.dtype
        if not self.layer.training and not torch.is_autocast_enabled(query.device.type) and query.dtype in DTYPES:
            wanted = query.dtype
        if (weight.device, weight.dtype) != (query.device, wanted):
            self.layer.to(device=query.device, dtype=wanted)
        return wanted


@dataclass(eq=False)
class _UNetAttachment:
    """What is installed on a U-Net."""

    unet: Any
    adapter: SunAdapter
    strength: float
    guidance_scale: float | None
    processors: dict[str, SunAttnProcessor]
    hooks: list[Any] = field(default_factory=list)
    pipelines: int = 0

    @classmethod
    def install(
        cls, unet: Any, adapter: SunAdapter, strength: float, guidance_scale: float | None, modules: dict[str, Any]
    ) -> _UNetAttachment:
        device = None if unet.device.type == "meta" else unet.device
        adapter.to(device=device, dtype=None if adapter.training or unet.dtype not in DTYPES else unet.dtype)
        processors = {
            name: SunAttnProcessor(layer, position, strength, attention.processor)
            for position, ((name, attention), layer) in enumerate(
                zip(modules.items(), adapter.sun_layers(), strict=True)
            )
        }
        attachment = cls(unet, adapter, strength, guidance_scale, processors)
        for name, attention in modules.items():
            attention.processor = processors[name]
        attachment.hooks.append(unet.register_forward_pre_hook(_check_negative, with_kwargs=True))
        attachment.hooks += keep_from_self_attention(unet, NEGATIVE, GUIDANCE, TEXTS)
        return attachment

    def remove(self) -> None:
        for name, processor in self.processors.items():
            attention = self.unet.get_submodule(name)
            if attention.processor is processor:  # else someone replaced it since; theirs stays
                attention.processor = processor.prior
        for hook in self.hooks:
            hook.remove()
        if self.unet.__dict__.get("_sun") is self:
            del self.unet._sun

    def matches(self, adapter: SunAdapter, strength: float, guidance_scale: float | None) -> bool:
        same = self.adapter is adapter and self.strength == strength and self.guidance_scale == guidance_scale
        return same and self.in_place()

    def in_place(self) -> bool:
        return all(self.unet.get_submodule(name).processor is own for name, own in self.processors.items())


def _check_negative(
    unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]] | None:
    """Forward pre-hook of the U-Net: check ``sun_negative`` once and fit it to the batch."""
    kwargs = dict(zip(UNET_ARGUMENTS, args, strict=False)) | kwargs
    options = kwargs.get("cross_attention_kwargs") or {}
    if options.get(NEGATIVE) is None:
        return None
    attachment: _UNetAttachment = unet._sun
    if not attachment.in_place():
        raise RuntimeError(REPLACED)
    negative = fit_negative(options[NEGATIVE], kwargs["encoder_hidden_states"], attachment.adapter.text_width)
    wanted = options.get(GUIDANCE)
    guidance = attachment.adapter.guidance(attachment.guidance_scale if wanted is None else wanted)
    if guidance is not None and len(guidance) > 1:
        guidance = fit_rows(guidance, len(negative), GUIDANCE)
    texts: AdapterTexts | None = options.get(TEXTS)
    if texts is not None:  # someone may have changed a prompt since
        unchanged = texts.negatives[0] is options[NEGATIVE] and texts.positive is kwargs["encoder_hidden_states"]
        texts = texts if unchanged else None
    options = {**options, NEGATIVE: negative, GUIDANCE: guidance, TEXTS: texts}
    return (), {**kwargs, "cross_attention_kwargs": options}


def texts_for(
    unet: Any, negative: torch.Tensor, positive: torch.Tensor, guidance_scale: Any = None, kept: RunTexts | None = None
) -> AdapterTexts | None:
    """The adapter's K and V of two texts [B, L, text_width], for ``cross_attention_kwargs={"sun_texts": ...}``.

    They serve calls of ``unet``, which has an adapter, with these very tensors and this guidance scale. ``kept``:
    where a run keeps them. None where they have to be computed at each call: while the adapter trains, under autocast,
    for another number of rows, at strength 0.
    """
    attachment: _UNetAttachment = getattr(unet, "_orig_mod", unet)._sun
    adapter, dtype = attachment.adapter, positive.dtype
    fixed = not adapter.training and not torch.is_autocast_enabled(positive.device.type) and dtype in DTYPES
    if not fixed or attachment.strength == 0.0 or len(negative) != len(positive) or dtype != negative.dtype:
        return None
    place = (positive.device, dtype)
    if any((layer.alpha_neg.device, layer.alpha_neg.dtype) != place for layer in adapter.sun_layers()):
        adapter.to(*place)
    guidance = adapter.guidance(attachment.guidance_scale if guidance_scale is None else guidance_scale)
    if guidance is not None and len(guidance) > 1:
        guidance = fit_rows(guidance, len(negative), GUIDANCE)
    make: Callable[..., AdapterTexts] = adapter.texts if kept is None else functools.partial(kept, adapter)
    return make([(1.0, negative)], positive, strength=attachment.strength, guidance=guidance)


def fit_negative(negative: Any, positive: torch.Tensor, text_width: int, name: str = NEGATIVE) -> torch.Tensor:
    """Return negative embeddings with the rows, device and dtype of the positive ones [B, L, text_width].

    One row serves the whole batch; n rows serve B / n neighbouring images each, the order in which diffusers lays out
    several images a prompt. Raises TypeError or ValueError, saying what to pass as ``name``.
    """
    if not isinstance(negative, torch.Tensor) or not negative.is_floating_point():
        kind = str(negative.dtype) if isinstance(negative, torch.Tensor) else type(negative).__name__
        raise TypeError(f"{name} must be text embeddings, a floating-point tensor [B, L, {text_width}], not {kind}.")
    if negative.ndim != 3 or negative.shape[-1] != text_width:
        raise ValueError(
            f"{name} has shape {list(negative.shape)}; the U-Net needs text embeddings [B, L, {text_width}]. "
            "Encode the negative prompt with the text encoder of this model."
        )
    return fit_rows(negative.to(device=positive.device, dtype=positive.dtype), positive.shape[0], name)


def fit_rows(values: torch.Tensor, batch: int, name: str) -> torch.Tensor:
    """``values`` [n, ...] as [batch, ...], each row for batch / n neighbours. Raises ValueError, naming ``name``."""
    rows = values.shape[0]
    if rows == 0 or batch % rows:
        raise ValueError(
            f"{name} has {rows} rows for a batch of {batch}. Pass 1, {batch}, or a number that divides {batch}."
        )
    return values if rows == batch else values.repeat_interleave(batch // rows, dim=0)


def keep_from_self_attention(unet: Any, *names: str) -> list[Any]:
    """Hook every self-attention so that it does not get the options ``names``, of which diffusers would warn there.

    Returns the hooks' handles.
    """

    def drop(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if names[0] not in kwargs:
            return None
        return args, {key: value for key, value in kwargs.items() if key not in names}

    layers = [module for name, module in unet.named_modules() if name.endswith(".attn1")]
    return [module.register_forward_pre_hook(drop, with_kwargs=True) for module in layers]


REPLACED = (
    "The attention processors of this U-Net were replaced after sun.attach (attention slicing, xformers, fused "
    "projections and IP-Adapters do that), so SUN would do nothing. Make that change first, then call sun.attach "
    "again; IP-Adapter and SUN cannot be combined."
)


def _check_attention(name: str, attention: Any) -> None:
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


def _describe(unet: Any) -> str:
    origin = str(unet.config.get("_name_or_path") or "")
    return f"the U-Net of {origin}" if origin else "this U-Net"


def _pipeline_and_unet(target: Any) -> tuple[Any, Any]:
    """Return (pipeline or None, U-Net), looking through torch.compile's wrapper."""
    pipe: Any = target if isinstance(target, DiffusionPipeline) else None
    if pipe is not None and not isinstance(pipe, SUPPORTED_PIPELINES):
        names = ", ".join(cls.__name__ for cls in SUPPORTED_PIPELINES)
        raise TypeError(
            f"SUN does not support {type(pipe).__name__}. Supported: {names}, and a bare UNet2DConditionModel."
        )
    unet = target if pipe is None else pipe.unet
    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(
            f"SUN attaches to a Stable Diffusion 1.x pipeline or UNet2DConditionModel, not {type(unet).__name__}."
        )
    return pipe, unet


# --- the pipeline ------------------------------------------------------------------------------------------------


def _trailing_ddim(pipe: Any, final_sigma_zero: bool) -> Any:
    state = pipe.__dict__.get("_sun")
    config = (pipe.scheduler if state is None else state.original_scheduler).config
    scheduler = make_scheduler("ddim", config)
    if final_sigma_zero:
        return scheduler
    return type(scheduler).from_config(scheduler.config, set_alpha_to_one=config.get("set_alpha_to_one", True))


@dataclass(eq=False)
class _PipelineAttachment:
    """What a pipeline was before, and, during a run only, its text embeddings and what the adapter makes of them."""

    original_scheduler: Any
    attachment: _UNetAttachment
    negative: torch.Tensor | None = None
    positive: torch.Tensor | None = None
    texts: RunTexts = field(default_factory=RunTexts)
    guidance_scale: float | None = None
    running: bool = False
    warned: bool = False


@functools.cache
def _sun_class(base: Any) -> Any:
    """Return the subclass of a pipeline class that samples with SUN. It keeps the name: diffusers saves by it."""

    class SunPipeline(base):
        scheduler: Any

        @functools.wraps(base.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            state: _PipelineAttachment = self._sun
            unet = getattr(self.unet, "_orig_mod", self.unet)
            if getattr(unet, "_sun", None) is not state.attachment:
                raise RuntimeError(
                    "The U-Net of this pipeline was replaced, detached or given another adapter since "
                    "sun.attach(pipe). Call sun.attach(pipe, adapter) again, or sun.detach(pipe)."
                )
            if not state.attachment.in_place():
                raise RuntimeError(REPLACED)
            if kwargs.get("ip_adapter_image") is not None or kwargs.get("ip_adapter_image_embeds") is not None:
                raise ValueError("IP-Adapter and SUN cannot be combined. Call sun.detach(pipe) to use an IP-Adapter.")
            wanted = kwargs.get("guidance_scale")
            if state.attachment.adapter.guided:
                state.guidance_scale = wanted
            elif (wanted or 0.0) > 1.0 and not state.warned:
                state.warned = True
                warnings.warn(
                    "guidance_scale is ignored: the guidance of a SUN adapter is in its weights. "
                    "Use sun.attach(pipe, adapter, strength=...) to change its effect.",
                    stacklevel=2,
                )
            state.running = True
            try:
                return super().__call__(*args, **kwargs)
            finally:
                state.running, state.guidance_scale = False, None
                state.negative = state.positive = None
                state.texts.clear()

        @property
        def do_classifier_free_guidance(self) -> bool:
            return False

        @property
        def cross_attention_kwargs(self) -> dict[str, Any] | None:
            options = super().cross_attention_kwargs
            state: _PipelineAttachment = self._sun
            if state.negative is None:
                return options
            texts = None
            if state.positive is not None:
                texts = texts_for(self.unet, state.negative, state.positive, state.guidance_scale, state.texts)
            return {NEGATIVE: state.negative, GUIDANCE: state.guidance_scale, TEXTS: texts, **(options or {})}

        def encode_prompt(
            self,
            prompt: Any,
            device: Any,
            num_images_per_prompt: int,
            do_classifier_free_guidance: bool,
            negative_prompt: Any = None,
            prompt_embeds: torch.Tensor | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            running = self._sun.running
            if running and isinstance(negative_prompt, str) and not isinstance(prompt, str):
                rows = len(prompt) if prompt_embeds is None else prompt_embeds.shape[0]
                negative_prompt = [negative_prompt] * rows
            positive, negative = super().encode_prompt(
                prompt,
                device,
                num_images_per_prompt,
                running or do_classifier_free_guidance,  # has diffusers encode the negative prompt as for CFG
                negative_prompt,
                prompt_embeds,
                *args,
                **kwargs,
            )
            if running:
                self._sun.negative, self._sun.positive = negative, positive
            return positive, negative

        def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
            """Save the pipeline as it was before: diffusers could not load our scheduler."""
            chosen: Any = self.scheduler
            self.scheduler = self._sun.original_scheduler
            try:
                return super().save_pretrained(*args, **kwargs)
            finally:
                self.scheduler = chosen

    SunPipeline.__name__, SunPipeline.__qualname__ = base.__name__, base.__qualname__
    SunPipeline.__module__, SunPipeline.__doc__ = base.__module__, base.__doc__
    return SunPipeline
