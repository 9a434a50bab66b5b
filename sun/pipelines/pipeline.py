"""A diffusers pipeline with SUN: it encodes the negative prompt, hands it to its U-Net and runs no guidance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..common.notes import note
from ..kept import Negative
from .layered import original_call
from .text import answer_to_text_model, cut_by_encoder
from .unet import CURRENT, NEGATIVE, REPLACED, RUN, DiffusersRun, Steering, UNetAttachment, attachment_of

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
    warned: bool = False


class WithSun(Base):
    """The layer that ``attach`` puts on a pipeline's class. All that belongs to a call is in its run."""

    scheduler: Any

    @staticmethod
    @contextmanager
    def around(pipe: Any, given: Mapping[str, Any]) -> Iterator[None]:
        state: PipelineAttachment = pipe._sun
        _check(pipe, state, given)
        run = state.steering.run(_guidance(state, given))
        before = CURRENT.set(run)
        try:
            yield
        finally:
            CURRENT.reset(before)
            run.end()
        if run.plain_calls and not run.calls:
            raise RuntimeError(_did_nothing(pipe))

    @property
    def do_classifier_free_guidance(self) -> bool:
        return False

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        options: dict[str, Any] | None = super().cross_attention_kwargs
        run = _run_of(self)
        if run is None or not run.negatives:
            return options
        return {NEGATIVE: run.negatives[0].text, RUN: run, **(options or {})}

    @property
    def components(self) -> dict[str, Any]:
        """The parts as they were before: pipelines made of them know nothing of SUN."""
        return {**super().components, "scheduler": self._sun.original_scheduler}

    def encode_prompt(
        self,
        prompt: Any,
        device: Any,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: Any = None,
        prompt_embeds: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        run = _run_of(self)
        if run is not None:
            _tell_cuts(self.tokenizer, prompt, negative_prompt)
        if kwargs.get("clip_skip") is not None:
            answer_to_text_model(self.text_encoder)
        if run is not None and isinstance(negative_prompt, str) and not isinstance(prompt, str):
            rows = len(prompt) if prompt_embeds is None else prompt_embeds.shape[0]
            negative_prompt = [negative_prompt] * rows
        positive, negative = super().encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            run is not None or do_classifier_free_guidance,  # has diffusers encode the negative prompt as for CFG
            negative_prompt,
            prompt_embeds,
            *args,
            **kwargs,
        )
        if run is not None:
            run.negatives = (Negative(text=negative),)
        return positive, negative

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


def _check(pipe: Any, state: PipelineAttachment, given: Mapping[str, Any]) -> None:
    """Raise for what would leave SUN out, before anything is computed."""
    attachment = state.attachment
    if attachment_of(pipe.unet) is not attachment or state.steering not in attachment.users:
        raise RuntimeError(
            "The U-Net of this pipeline was replaced or detached since sun.attach(pipe). Call sun.attach(pipe, "
            "adapter) again, or sun.detach(pipe)."
        )
    if not attachment.in_place():
        raise RuntimeError(REPLACED)
    if any(given.get(name) is not None for name in ("ip_adapter_image", "ip_adapter_image_embeds")):
        raise ValueError("IP-Adapter and SUN cannot be combined. Call sun.detach(pipe) to use an IP-Adapter.")
    attachment.watch(pipe.unet)


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
        f"SUN did nothing in this run: {original_call(pipe).__qualname__} calls the U-Net without the pipeline's "
        "cross_attention_kwargs, through which SUN gets the negative prompt. Use one of diffusers' own Stable "
        "Diffusion pipelines, or hand cross_attention_kwargs=self.cross_attention_kwargs to the U-Net and call it with "
        "the positive prompt alone, or call sun.detach(pipe)."
    )
