"""SUN in diffusers: ``attach`` puts an adapter on a pipeline or a bare U-Net, ``detach`` takes it off again.

The negative text reaches the U-Net as ``cross_attention_kwargs={"sun_negative": embeds}``; nothing about a run is kept
on it. A pipeline becomes an instance of a subclass of its own class that encodes the negative prompt, hands it over
that way and never runs classifier-free guidance.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

from diffusers import DiffusionPipeline, UNet2DConditionModel, UNetMotionModel

from ..adapter import SunAdapter
from ..common.notes import note
from ..layers import layers_of_unet, text_transformer_attentions
from ..prediction import check_prediction
from .layered import original_call, put_on, spelled_out, take_off
from .pipeline import PipelineAttachment, WithSun
from .processors import check_attention
from .schedulers import make_scheduler, prediction_of
from .unet import Steering, UNetAttachment, attachment_of

UNETS: tuple[Any, ...] = (UNet2DConditionModel, UNetMotionModel)
CONTROLNET_PROMPTS = ("positive", "both")


def attach(
    target: Any,
    adapter: SunAdapter | str | os.PathLike[str],
    strength: float = 1.0,
    *,
    final_sigma_zero: bool = True,
    guidance_scale: float | None = None,
    controlnet_prompt: str = "positive",
) -> None:
    """Put a SUN adapter on a diffusers pipeline or a bare U-Net, replacing one put there before.

    Any pipeline will do that has a Stable Diffusion 1.x ``UNet2DConditionModel`` or ``UNetMotionModel`` (AnimateDiff),
    encodes its prompts with ``encode_prompt`` (older ones: ``_encode_prompt``), and calls its U-Net with the positive
    prompt alone where there is no guidance. It then takes ``prompt`` and ``negative_prompt`` as always and calls its
    U-Net once a step, whatever its ``guidance_scale``. Its scheduler becomes DDIM on SUN's trailing timesteps; assign
    another to ``pipe.scheduler`` afterwards if you like. A bare U-Net takes the negative text embeddings
    [B or 1, L, text_width] through ``cross_attention_kwargs={"sun_negative": embeds}`` and without them behaves as
    before; fewer rows than the batch are repeated, each for as many neighbouring images. Who calls a bare U-Net many
    times with the same texts may hand over ``"sun_run": sun.pipelines.new_run(unet)`` with them, as pipelines do for
    each run: the adapter's K and V are then not computed at every call.

    adapter: a ``SunAdapter`` or a file. It is moved to the U-Net's device and, unless it is in training mode, dtype.
    strength: 1 is the trained adapter, 0 the plain conditional U-Net bit for bit.
    guidance_scale: for adapters that take one, w instead of the scale they were made for. A pipeline's own
    ``guidance_scale`` argument goes before it; for a bare U-Net, so does ``cross_attention_kwargs={"sun_guidance": w}``
    (a number, or a tensor [B]).
    final_sigma_zero: end at sigma 0, as other hosts do; False keeps the pipeline's own setting of ``set_alpha_to_one``
    (Stable Diffusion 1.5 ends at sigma 0.029).
    controlnet_prompt: what ControlNets of the pipeline read: the "positive" prompt, as everywhere, or "both", the
    negative's tokens after the positive's, as the authors' code did.

    Pipelines may share a U-Net; each is attached by itself and keeps its adapter and strength. Pipelines made of the
    parts of an attached one (``from_pipe``, ``components``) have to be attached too. Calls from several threads wait
    for each other. LoRAs and IP-Adapters may be loaded before or after; an IP-Adapter's attention over pictures is
    added to SUN's result. A U-Net is best compiled before. ``save_pretrained`` writes the pipeline without SUN. Other
    custom attention processors are refused.

    A model that predicts v is told of by a warning: adapters are trained on models that predict the noise.

    Raises SunFileError if the file is unusable or made for another base model, TypeError or ValueError if the target
    is not a Stable Diffusion 1.x pipeline or U-Net, or predicts what cannot be sampled.
    """
    if controlnet_prompt not in CONTROLNET_PROMPTS:
        raise ValueError(
            f"controlnet_prompt is {' or '.join(map(repr, CONTROLNET_PROMPTS))}, not {controlnet_prompt!r}."
        )
    pipe, unet = pipeline_and_unet(target)
    if not isinstance(adapter, SunAdapter):
        adapter = SunAdapter.load(adapter)
    layers = layers_of_unet(unet)
    adapter.guidance(guidance_scale)  # says so now if the adapter cannot
    adapter.check_base([la.channels for la in layers], unet.config.cross_attention_dim, _describe(unet))
    modules, chosen = text_transformer_attentions(unet), tuple(layer.diffusers for layer in layers)
    for name in chosen:
        check_attention(name, modules[name])
    scheduler = None if pipe is None else _trailing_ddim(pipe, final_sigma_zero)
    if scheduler is not None and (said := check_prediction(*prediction_of(scheduler.config))):
        note(said)

    # nothing can fail from here on: what was attached before makes way
    if pipe is not None:
        detach(pipe)
    attachment = attachment_of(unet) or UNetAttachment.install(unet, modules, chosen)
    attachment.renew()
    steering = Steering(adapter, strength, guidance_scale, by_pipeline=pipe is not None)
    attachment.add(steering)
    attachment.watch(target if pipe is None else pipe.unet)
    if pipe is not None:
        pipe._sun = PipelineAttachment(pipe.scheduler, attachment, steering, controlnet_prompt)
        put_on(pipe, WithSun)
        pipe.scheduler = scheduler


def detach(target: Any) -> None:
    """Take the adapter off and restore class, scheduler and attention processors; without one, do nothing.

    Detaching a U-Net that pipelines share detaches it for all of them. Raises TypeError for another target.
    """
    pipe, unet = pipeline_and_unet(target)
    if pipe is None:
        if (attachment := attachment_of(unet)) is not None:
            attachment.remove()
        return
    state: PipelineAttachment | None = pipe.__dict__.get("_sun")
    if state is None:
        return
    take_off(pipe, WithSun)
    del pipe._sun
    pipe.scheduler = state.original_scheduler
    state.attachment.drop(state.steering)


def _describe(unet: Any) -> str:
    origin = str(unet.config.get("_name_or_path") or "")
    return f"the U-Net of {origin}" if origin else "this U-Net"


def pipeline_and_unet(target: Any) -> tuple[Any, Any]:
    """Return (pipeline or None, U-Net), looking through torch.compile's wrapper. Raises TypeError for other targets."""
    pipe: Any = target if isinstance(target, DiffusionPipeline) else None
    unet = target if pipe is None else getattr(pipe, "unet", None)
    unet = getattr(unet, "_orig_mod", unet)
    if pipe is not None and (reason := why_not(pipe, unet)):
        raise TypeError(
            f"SUN does not support {type(pipe).__name__}: {reason}. It works in pipelines of Stable Diffusion 1.x that "
            "take a prompt and a negative prompt, and on a bare UNet2DConditionModel or UNetMotionModel."
        )
    if not isinstance(unet, UNETS):
        raise TypeError(
            "SUN attaches to a Stable Diffusion 1.x pipeline, UNet2DConditionModel or UNetMotionModel, not "
            f"{type(unet).__name__}."
        )
    return pipe, unet


def why_not(pipe: Any, unet: Any) -> str:
    """Why SUN cannot work in a pipeline with this U-Net (or None), in words; empty if it can."""
    if not isinstance(unet, UNETS):
        other = next(
            (part for name in ("transformer", "prior") if (part := getattr(pipe, name, None)) is not None), unet
        )
        return f"its denoiser is a {type(other).__name__}" if other is not None else "it has no U-Net"
    if "text_encoder_2" in pipe.config or unet.config.get("addition_embed_type"):
        return "it is of the SDXL family, whose U-Net takes more than one text"
    arguments = inspect.signature(original_call(pipe)).parameters
    if "image_guidance_scale" in arguments:
        return "it guides by its input picture too, with three rows a step, and SUN takes the place of guidance by text"
    encoders = [spelled_out(type(pipe), name) for name in ("encode_prompt", "_encode_prompt")]
    asked = {"prompt", "negative_prompt", "do_classifier_free_guidance"}
    if "tokenizer" not in pipe.config or not any(e is not None and asked <= set(e.parameters) for e in encoders):
        return "it does not encode prompts (encode_prompt), of which SUN needs the positive and the negative one"
    own = original_call(pipe).__module__.startswith("diffusers.")
    if own and not {"negative_prompt", "negative_prompt_embeds"} & set(arguments):
        return "it takes no negative prompt"
    return ""


def _trailing_ddim(pipe: Any, final_sigma_zero: bool) -> Any:
    state = pipe.__dict__.get("_sun")
    config = (pipe.scheduler if state is None else state.original_scheduler).config
    scheduler = make_scheduler("ddim", config)
    if final_sigma_zero:
        return scheduler
    return type(scheduler).from_config(scheduler.config, set_alpha_to_one=config.get("set_alpha_to_one", True))
