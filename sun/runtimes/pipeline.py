"""``sun.load_exported``: a folder of ``sun export`` as a pipeline, called as diffusers' are."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

from ..common.reading import ReadError, printable, read_json
from ..pipelines import GUIDANCE, NEGATIVE
from ..pipelines.kinds import PIPELINES
from ..pipelines.schedulers import make_scheduler
from ..pipelines.text import encode_prompts
from . import engines
from .contents import Contents, ExportError, read_contents
from .stand_ins import STRENGTH, AutoencoderStandIn, ControlNetStandIn, TextEncoderStandIn, UNetStandIn

REFERENCE_STEPS = 25


def load_exported(
    folder: str | Path, *, threads: int | None = None, device: str = "CPU", verify: bool = True
) -> ExportedPipeline:
    """The pipeline of a folder that ``sun export`` made.

    threads: processor threads of the runtime, None for all. device: OpenVINO's name of a device; ONNX Runtime runs on
    the CPU. verify: look that no file has changed, which reads all of them once. Raises ExportError (a sentence: what
    is missing, damaged or not installed).
    """
    folder = Path(folder)
    contents = read_contents(folder, verify)
    engines.require(contents.runtime)

    def run(part: str) -> engines.Run:
        return engines.load(contents.runtime, folder / part, contents.weights, threads=threads, device=device)

    def config(part: str, name: str = "config.json") -> dict[str, Any]:
        try:
            found = read_json(folder / part / name, infinite=part == "scheduler")
        except (ReadError, OSError) as error:
            raise ExportError(f"{error} Export the model again.") from error
        if not isinstance(found, dict):
            raise ExportError(f"{printable(str(folder / part / name))} holds no settings. Export the model again.")
        return found

    text_config = CLIPTextConfig.from_dict(config("text_encoder"))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    tokenizer.model_max_length = text_config.max_position_embeddings
    unet = UNetStandIn({**config("unet"), "sun_guidance": contents.guidance}, run("unet"), contents.inputs["unet"])
    pipe = StableDiffusionPipeline(
        unet=unet,
        vae=AutoencoderStandIn(config("vae_decoder"), run("vae_encoder"), run("vae_decoder")),
        text_encoder=TextEncoderStandIn(text_config, run("text_encoder")),
        tokenizer=tokenizer,
        scheduler=make_scheduler(
            "ddim" if contents.with_sun else "dpmpp_2m", config("scheduler", "scheduler_config.json")
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    controlnet = ControlNetStandIn(config("controlnet"), run("controlnet")) if contents.controlnet else None
    return ExportedPipeline(contents, pipe, controlnet)


class ExportedPipeline:
    """A Stable Diffusion with SUN in a runtime; make one with :func:`load_exported`.

    ``contents`` says what is in it, ``scheduler`` may be replaced, ``pipe`` is the text-to-image pipeline of diffusers
    whose U-Net, autoencoder and text encoder are the runtime's, ``controlnet`` the ControlNet, if one was exported.
    """

    def __init__(self, contents: Contents, pipe: Any, controlnet: Any = None) -> None:
        self.contents, self.pipe, self.controlnet = contents, pipe, controlnet

    @property
    def scheduler(self) -> Any:
        """diffusers' scheduler of every kind of run."""
        return self.pipe.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.pipe.scheduler = scheduler

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        image: Any = None,
        mask_image: Any = None,
        control_image: Any = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sun_strength: float = 1.0,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> Any:
        """Draw, and return what diffusers' pipelines return (``.images``).

        image: a picture to start from. mask_image: where to repaint it. control_image: a ControlNet's picture.
        num_inference_steps: 4 by default, 25 for a model exported without an adapter. guidance_scale: of adapters that
        take one, by default their own; without an adapter classifier-free guidance, by default 7.5 (of
        the shipped model, its own). sun_strength: 1 is the trained adapter, 0 the plain model. Prompts may be of any
        length. Other options are those of diffusers' pipeline for such a run: ``strength``, ``height``, ``width``,
        ``generator``, ``latents``, ``output_type``, ``callback_on_step_end``, ``controlnet_conditioning_scale``, ...
        Raises ValueError.
        """
        if mask_image is not None and image is None:
            raise ValueError("a mask_image needs the image it masks.")
        if control_image is not None and self.controlnet is None:
            raise ValueError("this model was exported without a ControlNet. Export it again with --controlnet.")
        if prompt_embeds is None:
            if prompt is None:
                raise ValueError("give a prompt, or prompt_embeds.")
            prompt_embeds, negative_prompt_embeds = self.encode(prompt, negative_prompt)
        if negative_prompt_embeds is None:
            negative_prompt_embeds = self.encode([""], [""])[0].repeat(len(prompt_embeds), 1, 1)
        pipe = self.pipeline_for(control_image is not None, image is not None, mask_image is not None)
        inputs = {"image": image, "mask_image": mask_image}
        inputs["image" if control_image is not None and image is None else "control_image"] = control_image
        steps = (
            (4 if self.contents.with_sun else REFERENCE_STEPS) if num_inference_steps is None else num_inference_steps
        )
        self.check_size(options.get("width"), options.get("height"))
        if self.contents.size and image is None:
            width, height = self.contents.size
            options = {"width": width, "height": height, **options}
        return pipe(
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            num_inference_steps=steps,
            num_images_per_prompt=num_images_per_prompt,
            **self.steering(negative_prompt_embeds, sun_strength, guidance_scale),
            **{name: value for name, value in inputs.items() if value is not None},
            **options,
        )

    def encode(self, prompt: str | Sequence[str], negative: str | Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """Text states [B, L, D] of prompts and negative prompts of any length. Raises ValueError."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        avoided = negative or ""
        negatives = [avoided] * len(prompts) if isinstance(avoided, str) else list(avoided)
        if len(negatives) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts and {len(negatives)} negative prompts: give one for each, or one."
            )
        states = encode_prompts(self.pipe.tokenizer, self.pipe.text_encoder, prompts, negatives)
        return states[0], states[1]

    def steering(self, negative: Tensor, strength: float, guidance: float | None) -> dict[str, Any]:
        """How the pipelines are told of the negative text states [B, L, D]: arguments of their call.

        strength: of SUN. guidance: the scale w, for adapters that take one; None is their own. Raises ValueError.
        """
        contents = self.contents
        if not contents.with_sun:
            return {"guidance_scale": contents.usual_guidance if guidance is None else guidance}
        if guidance is not None and not contents.guided and guidance != contents.guidance:
            own = "" if contents.guidance is None else f" at {contents.guidance:g}"
            raise ValueError(
                f"this adapter's guidance scale is fixed{own}. Leave guidance_scale out, and use sun_strength."
            )
        if guidance is not None and guidance <= 0:
            raise ValueError(f"the guidance scale must be above 0, not {guidance:g}.")
        options = {NEGATIVE: negative, STRENGTH: strength, GUIDANCE: guidance if contents.guided else None}
        return {"guidance_scale": 1.0, "cross_attention_kwargs": options}

    def check_size(self, width: int | None, height: int | None) -> None:
        """Raise ValueError if the graphs are fixed to another size."""
        fixed = self.contents.size
        if fixed and ((width or fixed[0]), (height or fixed[1])) != fixed:
            raise ValueError(
                f"this model was exported for pictures of {fixed[0]}x{fixed[1]}. Draw that size, or export it again "
                "without --size."
            )

    def pipeline_for(self, control: bool, image: bool, mask: bool) -> Any:
        """diffusers' pipeline for a kind of run, of the runtime's parts."""
        kind = PIPELINES[control, image, mask]
        accepted = inspect.signature(kind.__init__).parameters
        parts = {**self.pipe.components, "controlnet": self.controlnet}
        pipe = kind(**{k: v for k, v in parts.items() if k in accepted}, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe
