"""SUN on a diffusers U-Net: what is installed there, and the hook that makes K and V of the texts for each call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from einops import rearrange
from torch import Tensor, nn

from ..adapter import SunAdapter
from ..common.notes import note
from ..conditioning import AdapterTexts, repeated_side_by_side
from ..files import DTYPES
from ..kept import Negative, SunRun, autocast_dtype
from .processors import is_image_processor, put_into, take_out
from .rows import OwnGuidance, layouts, which_rows

NEGATIVE = "sun_negative"
"""In cross_attention_kwargs: the negative text's states [B or 1, L, text_width]; inside the U-Net, what the adapter
made of both texts."""
GUIDANCE = "sun_guidance"
RUN = "sun_run"
UNET_ARGUMENTS = tuple(inspect.signature(UNet2DConditionModel.forward).parameters)[1:]
MOTION_ARGUMENTS = tuple(inspect.signature(UNetMotionModel.forward).parameters)[1:]
REPLACED = (
    "The attention processors of this U-Net were replaced after sun.attach (attention slicing, xformers and fused "
    "projections do that), so SUN would do nothing. Make that change first, then call sun.attach again."
)
LEFT_OUT = (
    "SUN did nothing in this call of the U-Net: sun.attach put an adapter on a pipeline of it, and something else "
    "calls it, without a negative for SUN. For another pipeline made of the same parts (from_pipe, components) call "
    "sun.attach on that one too; to use the plain U-Net, call sun.detach first."
)
OWN_GUIDANCE = (
    "This pipeline calls the U-Net with the negative prompt as rows of the batch, to run classifier-free guidance, "
    "which SUN takes the place of. SUN works in pipelines that call the U-Net with the positive prompt alone where "
    "guidance_scale is 1 or self.do_classifier_free_guidance is False. Use such a one, or call sun.detach(pipe)."
)
NO_IMAGE = (
    "An IP-Adapter is loaded and this call has no picture for it. Pass ip_adapter_image or ip_adapter_image_embeds, or "
    "call pipe.unload_ip_adapter()."
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
    """A run that knows what acts in it and, in a pipeline, the prompts that were encoded for it.

    plain_calls: calls of the U-Net that gave SUN no negative. positive: the positive prompts [P, L, D] as they were
    encoded, a row for each in ``negatives``. options: what the pipeline hands to its U-Net as cross_attention_kwargs.
    """

    steering: Steering | None = None
    plain_calls: int = 0
    positive: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    _fitted: tuple[Tensor, int, Tensor] | None = None
    _layouts: dict[int, list[int]] = field(default_factory=dict)

    def encoded(self, positive: Tensor, negative: Tensor) -> None:
        """The pipeline has encoded its prompts: from here on its U-Net gets the negative."""
        before = self.negatives[0].text if self.negatives else None
        if NEGATIVE not in self.options or (before is not None and self.options[NEGATIVE] is before):
            self.options[NEGATIVE] = negative  # else the caller handed over another
        self.positive, self.negatives = positive, (Negative(text=negative),)
        self._fitted = None

    def is_own(self, negative: Any) -> bool:
        """Whether this is the negative of the run's prompts, and none that somebody handed over instead."""
        return self.positive is not None and negative is self.negatives[0].text

    def negative_for(self, text: Tensor, frames: int, *, known: bool = False) -> Tensor | None:
        """The negative of each row of a call's positive text [N, L, D], as the pipeline laid out its prompts.

        Texts that were changed on the way keep the layout of those before. known: None for such texts. Raises
        OwnGuidance for the rows of classifier-free guidance.
        """
        negative, positive = self.negatives[0].text, self.positive
        assert negative is not None
        assert positive is not None
        version = 0 if text.is_inference() else text._version
        if self._fitted is not None and self._fitted[0] is text and self._fitted[1] == version:
            return self._fitted[2]
        layout = which_rows(text, positive, negative, frames)
        if layout is None and known:
            return None
        rows = len(text)
        likely = layouts(rows, len(positive), frames)
        layout = layout or self._layouts.get(rows) or (likely[0] if likely else None)
        if layout is None:  # which says so
            return repeated_side_by_side(negative, rows, NEGATIVE)
        self._layouts[rows] = layout
        fitted = negative if layout == list(range(len(negative))) else negative[layout]
        self._fitted = text, version, fitted
        return fitted

    def end(self) -> None:
        super().end()
        self.positive, self._fitted = None, None
        for name in (NEGATIVE, RUN):
            self.options.pop(name, None)


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


@dataclass(eq=False)
class UNetAttachment:
    """What is installed on a U-Net. Each of its users, pipelines or bare callers, has an adapter of its own."""

    unet: Any
    attentions: tuple[Any, ...]
    """The modules attn2, in the adapter's order."""
    arguments: tuple[str, ...] = UNET_ARGUMENTS
    """Of the U-Net's forward, by position."""
    processors: list[Any] = field(default_factory=list)
    """Ours in them: what was there is inside, or the image attention it is."""
    users: list[Steering] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    wrappers: list[Any] = field(default_factory=list)

    @classmethod
    def install(cls, unet: Any, attentions: Mapping[str, Any], chosen: tuple[str, ...]) -> UNetAttachment:
        """attentions: all modules by name that the U-Net hands its cross_attention_kwargs to; chosen: SUN's of them."""
        arguments = MOTION_ARGUMENTS if isinstance(unet, UNetMotionModel) else UNET_ARGUMENTS
        attachment = cls(unet, tuple(attentions[name] for name in chosen), arguments)
        attachment.renew()
        attachment.hooks.append(unet.register_forward_pre_hook(before_call, with_kwargs=True))
        attachment.hooks += keep_from([module for name, module in attentions.items() if name not in chosen], NEGATIVE)
        unet._sun = attachment
        return attachment

    def renew(self) -> None:
        """Put the processors in, on top of what someone may have put there since."""
        self.processors = [put_into(attention, i) for i, attention in enumerate(self.attentions)]

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
                take_out(attention)
        for hook in self.hooks:
            hook.remove()
        self.users = []
        if self.unet.__dict__.get("_sun") is self:
            del self.unet._sun

    def in_place(self) -> bool:
        """Whether SUN acts in every layer. An IP-Adapter that was loaded or unloaded since takes it along."""
        changed = [
            pair for pair in zip(self.attentions, self.processors, strict=True) if pair[0].processor is not pair[1]
        ]
        if changed and all(is_image_processor(own) or is_image_processor(a.processor) for a, own in changed):
            self.renew()
            return True
        return not changed


def before_call(
    unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: what the adapter makes of both texts takes the place of the negative's states.

    Every other argument stays as it was passed, by position or by name.
    """
    attachment = attachment_of(unet)
    if attachment is None:
        return None
    names = attachment.arguments
    given = dict(zip(names, args, strict=False)) | kwargs
    options = given.get("cross_attention_kwargs") or {}
    if isinstance(options.get(NEGATIVE), AdapterTexts):
        return None
    run, negative = _run_and_negative(attachment, given, options)
    if negative is None:
        _note_plain_call(attachment)
        if RUN not in options:
            return None
        made = None
    else:
        made = _texts(attachment, given, {**options, NEGATIVE: negative, RUN: run})
    options = {key: value for key, value in options.items() if key not in (NEGATIVE, GUIDANCE, RUN)}
    options[NEGATIVE] = made
    text = given["encoder_hidden_states"]
    if text.storage_offset() and _frames(given["sample"]) > 1:  # ``for_rows`` counts from the storage's begin
        args, kwargs = _replaced(names, args, kwargs, "encoder_hidden_states", text.clone())
    return _replaced(names, args, kwargs, "cross_attention_kwargs", options)


def _replaced(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with another value for one of them, by position or by name as it was."""
    position = names.index(name)
    if len(args) > position:
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


def _run_and_negative(
    attachment: UNetAttachment, given: dict[str, Any], options: dict[str, Any]
) -> tuple[DiffusersRun | None, Tensor | None]:
    """The run of a call and the negative of its rows, None if it has none.

    Both are in the options, but for pipelines that hand none to their U-Net: theirs is the run that is under way, if
    the texts of the call are the run's.
    """
    run: DiffusersRun | None = options.get(RUN)
    negative: Tensor | None = options.get(NEGATIVE)
    text, frames = given["encoder_hidden_states"], _frames(given["sample"])
    if torch.compiler.is_compiling():  # the hook is in the graph: nothing is compared there
        return run, negative
    if NEGATIVE in options or run is not None:
        if run is not None and negative is not None and run.is_own(negative):
            try:
                negative = run.negative_for(text, frames)
            except OwnGuidance:
                raise RuntimeError(OWN_GUIDANCE) from None
        return run, negative
    run = CURRENT.get()
    if run is None or run.positive is None or run.steering not in attachment.users or not isinstance(text, Tensor):
        return None, None
    try:
        return run, run.negative_for(text, frames, known=True)
    except OwnGuidance:
        return None, None


def _frames(sample: Tensor) -> int:
    """1 for pictures [B, C, H, W]; of videos [B, C, frames, H, W] how many."""
    return sample.shape[2] if sample.ndim == 5 else 1


def _texts(attachment: UNetAttachment, given: dict[str, Any], options: dict[str, Any]) -> AdapterTexts | None:
    """What the adapter makes of the texts of a call, None at strength 0. given: the call's arguments by name."""
    if not attachment.in_place():
        raise RuntimeError(REPLACED)
    positive: Tensor = given["encoder_hidden_states"]
    _check_call(attachment.unet, given)
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


def _check_call(unet: Any, given: dict[str, Any]) -> None:
    """Raise ValueError where texts and latents of a call do not belong together, or an IP-Adapter lacks its picture.

    torch would repeat a single text for all images.
    """
    sample, text = given["sample"], given["encoder_hidden_states"]
    rows = sample.shape[0] * _frames(sample)
    if len(text) != rows:
        raise ValueError(
            f"encoder_hidden_states has {len(text)} rows for {rows} of the sample. With SUN the U-Net gets the "
            "positive prompt alone, a row for each picture or frame: a callback that changes prompt_embeds returns as "
            "many rows as it was given, and another negative prompt as negative_prompt_embeds."
        )
    # diffusers sets it as an attribute of the config, beside the entry
    asks = getattr(unet.config, "encoder_hid_dim_type", None) == "ip_image_proj" and unet.encoder_hid_proj is not None
    if asks and "image_embeds" not in (given.get("added_cond_kwargs") or {}):
        raise ValueError(NO_IMAGE)


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
    return keep_from([module for name, module in unet.named_modules() if name.endswith(".attn1")], *names)


def keep_from(layers: list[nn.Module], *names: str) -> list[Any]:
    """The same for any attention layers."""
    return [module.register_forward_pre_hook(_Without(names), with_kwargs=True) for module in layers]
