"""A diffusers pipeline with SUN: it encodes the negative prompt, hands it to its U-Net and runs no guidance."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from ..common.notes import note
from .layered import original_call, spelled_out
from .text import answer_to_text_model, cut_by_encoder
from .unet import CURRENT, REPLACED, RUN, DiffusersRun, Steering, UNetAttachment, attachment_of

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline as Base
else:
    Base = object


@dataclass(eq=False)
class PipelineAttachment:
    """What a pipeline was before, and what it attached."""

    original_scheduler: Any
    attachment: UNetAttachment
    steering: Steering
    controlnet_prompt: str = "positive"
    warned: bool = False


class WithSun(Base):
    """The layer that ``attach`` puts on a pipeline's class. All that belongs to a call is in its run."""

    scheduler: Any

    @staticmethod
    @contextmanager
    def around(pipe: Any, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        state: PipelineAttachment = pipe._sun
        _check(pipe, state)
        run = state.steering.run(_guidance(state, given))
        options = given.get("cross_attention_kwargs")
        run.options.update({RUN: run, **(options or {})})
        before, hooks = CURRENT.set(run), _controlnet_hooks(pipe, state, run)
        try:
            yield _changes(pipe, given, run)
        finally:
            CURRENT.reset(before)
            run.end()
            for hook in hooks:
                hook.remove()
            if pipe.__dict__.get("_cross_attention_kwargs") is run.options:
                pipe._cross_attention_kwargs = options
        if run.plain_calls and not run.calls:
            raise RuntimeError(_did_nothing(pipe))

    @property
    def do_classifier_free_guidance(self) -> bool:
        return False

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        # Loops of other people's classes may never set it.
        options: dict[str, Any] | None = self.__dict__.get("_cross_attention_kwargs")
        run = _run_of(self)
        return options if run is None or options is run.options else {**run.options, **(options or {})}

    @property
    def components(self) -> dict[str, Any]:
        """The parts as they were before: pipelines made of them know nothing of SUN."""
        return {**super().components, "scheduler": self._sun.original_scheduler}

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """diffusers encodes the negative prompt as for classifier-free guidance; in a run it is kept for SUN."""
        encode, run = super().encode_prompt, _run_of(self)
        given = _bound(encode, args, kwargs)
        if given.get("clip_skip") is not None:
            answer_to_text_model(self.text_encoder)
        if run is None:
            return encode(*args, **kwargs)
        prompt, embeds = given.get("prompt"), given.get("prompt_embeds")
        _tell_cuts(self.tokenizer, prompt, given.get("negative_prompt"))
        if isinstance(given.get("negative_prompt"), str) and not isinstance(prompt, str):
            rows = len(prompt or ()) if embeds is None else embeds.shape[0]
            given["negative_prompt"] = [given["negative_prompt"]] * rows
        given["do_classifier_free_guidance"] = True
        if embeds is not None and given.get("negative_prompt_embeds") is None and _longer(self.tokenizer, embeds):
            given["negative_prompt_embeds"] = self._negative_alone(encode, given)
        positive, negative, *rest = encode(**given)
        run.encoded(positive, negative)
        return (positive, negative, *rest)

    def _negative_alone(self, encode: Callable[..., Any], given: dict[str, Any]) -> Tensor:
        """The negative prompt's states beside a positive prompt longer than the encoder takes: diffusers would have it
        encode as many tokens at once."""
        texts = given.pop("negative_prompt", None) or [""] * given["prompt_embeds"].shape[0]
        alone = {"prompt": texts, "prompt_embeds": None, "do_classifier_free_guidance": False}
        states: Tensor = encode(**{**given, **alone, "num_images_per_prompt": 1})[0]
        return states

    def _encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Of older pipelines, which return both prompts in one tensor where there is guidance: the positive alone."""
        encode, run = super()._encode_prompt, _run_of(self)
        if run is None:
            return encode(*args, **kwargs)
        run.positive = None
        both = encode(**{**_bound(encode, args, kwargs), "do_classifier_free_guidance": True})
        if run.positive is None:  # by no encode_prompt of diffusers
            negative, positive = both.chunk(2)
            run.encoded(positive, negative)
        return run.positive

    def _encode_prompt_free_noise(self, *args: Any, **kwargs: Any) -> Any:
        """AnimateDiff's, for long videos: a prompt and a negative prompt for each frame."""
        encode, run = super()._encode_prompt_free_noise, _run_of(self)
        if run is None:
            return encode(*args, **kwargs)
        both, negative = encode(**{**_bound(encode, args, kwargs), "do_classifier_free_guidance": True})
        positive = both.chunk(2)[1].clone()
        run.encoded(positive, negative)
        return positive, negative

    def prepare_ip_adapter_image_embeds(self, *args: Any, **kwargs: Any) -> Any:
        """Of embeddings made for guidance, two halves, the half of the pictures: there is no other row."""
        prepare = super().prepare_ip_adapter_image_embeds
        given = _bound(prepare, args, kwargs)
        embeds = given.get("ip_adapter_image_embeds")
        if _run_of(self) is not None and embeds is not None:
            given["ip_adapter_image_embeds"] = [e.chunk(2)[1] if len(e) % 2 == 0 else e for e in embeds]
        return prepare(**given)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the pipeline as it was before: diffusers could not load our scheduler."""
        chosen = self.scheduler
        self.scheduler = self._sun.original_scheduler
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.scheduler = chosen


def _run_of(pipe: Any) -> DiffusersRun | None:
    """The run of the call of ``pipe`` that is under way here, in this thread."""
    run = CURRENT.get()
    return run if run is not None and run.steering is pipe._sun.steering else None


def _bound(call: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a bound method by name, without defaults."""
    signature = spelled_out(type(call.__self__), call.__name__) or inspect.signature(call)
    bound = signature.bind(*args, **kwargs)
    given = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


def _longer(tokenizer: Any, embeds: Tensor) -> bool:
    """Whether states are of more tokens than the text encoder takes at once."""
    return tokenizer is not None and embeds.shape[1] > tokenizer.model_max_length


def _check(pipe: Any, state: PipelineAttachment) -> None:
    """Raise for what would leave SUN out, before anything is computed."""
    attachment = state.attachment
    if attachment_of(pipe.unet) is not attachment or state.steering not in attachment.users:
        raise RuntimeError(
            "The U-Net of this pipeline was replaced or detached since sun.attach(pipe). Call sun.attach(pipe, "
            "adapter) again, or sun.detach(pipe)."
        )
    if not attachment.in_place():
        raise RuntimeError(REPLACED)
    attachment.watch(pipe.unet)


def _changes(pipe: Any, given: Mapping[str, Any], run: DiffusersRun) -> dict[str, Any]:
    """Arguments of a pipeline's call that SUN changes: its U-Net gets the run, and no guidance is run beside it."""
    changes: dict[str, Any] = {"cross_attention_kwargs": run.options}
    if pipe.unet.config.get("time_cond_proj_dim") is None:  # else the scale is an input of the U-Net
        changes["guidance_scale"] = 1.0
    callback = given.get("callback_on_step_end")
    if callback is not None and not isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        changes["callback_on_step_end"] = _watched(callback, run)
    return changes


def _watched(callback: Callable[..., Any], run: DiffusersRun) -> Callable[..., Any]:
    """A callback whose other negative_prompt_embeds are the run's from then on."""

    @functools.wraps(callback, updated=())
    def watched(*args: Any, **kwargs: Any) -> Any:
        returned = callback(*args, **kwargs)
        negative = (returned or {}).get("negative_prompt_embeds")
        if isinstance(negative, Tensor) and run.positive is not None and negative is not run.negatives[0].text:
            run.encoded(run.positive, negative)
        return returned

    return watched


def _controlnet_hooks(pipe: Any, state: PipelineAttachment, run: DiffusersRun) -> list[Any]:
    """Where ControlNet is to read both prompts: a hook on it that gives it both, one after the other."""
    controlnet = getattr(pipe, "controlnet", None)
    if state.controlnet_prompt == "positive" or not isinstance(controlnet, torch.nn.Module):
        return []

    def both(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        place = 2  # (sample, timestep, encoder_hidden_states, ...), of ControlNets of all kinds
        text = args[place] if len(args) > place else kwargs["encoder_hidden_states"]
        if run.positive is None or run.strength == 0.0:
            return args, kwargs
        negative = run.negative_for(text, max(1, len(text) // len(run.positive)))
        assert negative is not None
        text = torch.cat([text, negative.to(text)], dim=1)
        if len(args) > place:
            return (*args[:place], text, *args[place + 1 :]), kwargs
        return args, {**kwargs, "encoder_hidden_states": text}

    # ahead of others' hooks, which then see what the ControlNet reads
    return [controlnet.register_forward_pre_hook(both, with_kwargs=True, prepend=True)]


def _guidance(state: PipelineAttachment, given: Mapping[str, Any]) -> Any:
    """w of a call, for adapters that take it."""
    wanted = given.get("guidance_scale")
    if state.steering.adapter.guided:
        return wanted
    if (wanted or 0.0) > 1.0 and not state.warned:
        state.warned = True
        note(
            "guidance_scale is ignored: the guidance of a SUN adapter is in its weights. "
            "Use sun.attach(pipe, adapter, strength=...) to change its effect."
        )
    return None


def _tell_cuts(tokenizer: Any, *prompts: Any) -> None:
    """A word about what diffusers leaves out of prompts; of negative ones it says nothing itself."""
    if tokenizer is None:
        return
    texts = [text for group in prompts for text in ([group] if isinstance(group, str) else group or [])]
    for cut in dict.fromkeys(cut_by_encoder(tokenizer, text) for text in texts):
        if cut:
            note(
                f"the text encoder takes {tokenizer.model_max_length - 2} tokens, so this end of a prompt is left out: "
                f"{cut!r}. sun.pipelines.text.encode_prompts encodes it whole, for prompt_embeds and "
                "negative_prompt_embeds."
            )


def _did_nothing(pipe: Any) -> str:
    return (
        f"SUN did nothing in this run: {original_call(pipe).__qualname__} does not call the U-Net with the positive "
        "prompt alone, as self.encode_prompt returned it: it runs classifier-free guidance of its own, or encodes "
        "prompts in another way. SUN works where guidance_scale=1 or self.do_classifier_free_guidance stops that; or "
        "hand cross_attention_kwargs=self.cross_attention_kwargs to the U-Net, or call sun.detach(pipe)."
    )
