"""SUN beside the model's own reference, 25-step DPM-Solver++ with classifier-free guidance, from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from ..pictures.draw import Loaded, noise
from ..pictures.png import grid
from ..pictures.recipe import Recipe, RecipeError
from ..pipelines.loading import require_text_to_image
from .loading import PAPER_W
from .names import REFERENCE, MethodCall, parse_method
from .sampler import Sampler


@dataclass
class Row:
    """One method on all prompts. Distances are to the reference, means over pictures; None for the reference itself."""

    call: MethodCall
    images: list[Image.Image]
    unet_calls: float
    seconds: float
    paired_mse: float | None = None
    psnr: float | None = None

    @property
    def method(self) -> str:
        return self.call.text

    @property
    def title(self) -> str:
        """A row's label: what ran, with how many U-Net calls, and how long it took a picture."""
        kind = "reference: " if self.paired_mse is None else ""
        return f"{kind}{self.call.title}, {self.unet_calls:g} U-Net calls, {self.seconds:.2f} s"

    def figures(self) -> dict[str, Any]:
        """What ``--json`` writes of a row."""
        shown = {
            "unet_calls": self.unet_calls,
            "seconds": self.seconds,
            "paired_mse": self.paired_mse,
            "psnr": self.psnr,
        }
        return {key: value for key, value in shown.items() if value is not None}


def compare(
    loaded: Loaded,
    recipe: Recipe,
    pairs: Sequence[tuple[str, str]],
    methods: Sequence[str | MethodCall],
    guidance: float | None = None,
    on_method: Callable[[str], None] | None = None,
    offsets: Sequence[int] | None = None,
    lcm_lora: str = "",
) -> list[Row]:
    """Run the reference and ``methods`` (``sun-4``, ``ddim-4``, ...) on (prompt, negative) pairs of one model.

    Pair ``i`` starts from the noise of ``recipe.seed + offsets[i]`` (without offsets: ``+ i``) in every method.
    ``guidance``: the reference's w; None: the adapter's own. ``lcm_lora``: the folder of an LCM-LoRA, for its
    methods. The reference's row comes first. Raises RecipeError, and ValueError for an unknown method.
    """
    calls = [parse_method(method) for method in methods]
    if loaded.adapter is None:
        raise RecipeError("comparing needs an adapter. Give --adapter FILE.")
    require_text_to_image(loaded.pipe, recipe.model)
    pipe, adapter = loaded.pipe, loaded.adapter.to(loaded.pipe.device, loaded.pipe.unet.dtype)
    sampler = Sampler(
        pipe.unet,
        pipe.vae,
        pipe.text_encoder,
        pipe.tokenizer,
        pipe.scheduler,
        adapter=adapter,
        w=guidance or adapter.info.guidance_scale or PAPER_W,
        lcm_lora=lcm_lora,
    )
    prompts, negatives = [p for p, _ in pairs], [n for _, n in pairs]
    offsets = list(range(len(pairs)) if offsets is None else offsets)
    start = noise(replace(recipe, batch=max(offsets) + 1), loaded)[offsets].to(pipe.device)
    half = pipe.unet.dtype != torch.float32
    with torch.autocast(pipe.device.type, pipe.unet.dtype) if half else nullcontext():
        for kind in ("cond-1", "sun-1"):  # the first calls pay for allocation and kernel choice
            sampler(kind, prompts, negatives, start, recipe.sun_strength)
        rows: list[Row] = []
        reference: torch.Tensor | None = None
        for call in dict.fromkeys((REFERENCE, *calls)):
            if on_method:
                on_method(call.text)
            sample = sampler(call, prompts, negatives, start, recipe.sun_strength)
            row = Row(call, sampler.decode(sample.latents), sample.unet_calls, sample.seconds)
            if reference is not None:
                row.paired_mse = float((sample.latents - reference).square().mean())
                row.psnr = sum(map(psnr, row.images, rows[0].images)) / len(row.images)
            else:
                reference = sample.latents
            rows.append(row)
    return rows


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB pictures, in dB; 100 for equal ones."""
    x, y = (torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).double() for i in (a, b))
    error = float((x - y).square().mean())
    return 100.0 if error == 0 else 10 * float(torch.log10(torch.tensor(255.0**2 / error)))


def picture(rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> Image.Image:
    """All rows as one labelled grid; small pictures are enlarged so that the labels can be read."""
    captions = [f"{prompt} (without: {negative})" if negative else prompt for prompt, negative in pairs]
    side = rows[0].images[0].width
    return grid(
        [image for row in rows for image in row.images],
        columns=len(pairs),
        row_labels=[row.title for row in rows],
        column_labels=captions,
        scale=max(1, round(192 / side)),
        gap=8,
    )
