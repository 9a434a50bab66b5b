"""img2img and inpainting, measured: every method edits the same pictures, and is compared with the reference's edit.

A prompt's starting picture is the reference's picture of the prompt before it, so that no data is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..common.settings import ConfigError
from .cells import Tensors
from .measured import ModelEvaluation
from .metrics import map_distance, mean_and_interval, psnr, ssim
from .names import REFERENCE, MethodCall
from .prompts import Drawn
from .sampler import Edit

KINDS = ("img2img", "inpaint")


def parse_edit(name: str) -> tuple[str, float]:
    """``img2img-0.5`` -> (kind, strength). Raises ConfigError."""
    kind, _, number = name.rpartition("-")
    try:
        strength = float(number)
    except ValueError:
        strength = 0.0
    if kind not in KINDS or not 0 < strength <= 1:
        raise ConfigError(f"edits are {' or '.join(KINDS)} with a strength of 0 to 1, as img2img-0.5, not {name!r}.")
    return kind, strength


def centre_mask(height: int, width: int) -> Tensor:
    """[1, 1, h, w]: the middle half of each side is made anew."""
    mask = torch.zeros(1, 1, height, width)
    mask[..., height // 4 : height - height // 4, width // 4 : width - width // 4] = 1
    return mask


class Edits:
    """The edits of one :class:`~.measured.ModelEvaluation`."""

    def __init__(self, evaluation: ModelEvaluation):
        self.of = evaluation
        self.count = min(evaluation.config.edit_prompts, len(evaluation.prompts.positives))
        self.methods = evaluation.methods_among(evaluation.config.edit_methods)

    def _first(self, other_noise: bool = False) -> Drawn:
        """The prompts that are edited."""
        drawn = self.of.all_prompts(other_noise)
        return replace(drawn, positives=drawn.positives[: self.count], negatives=drawn.negatives[: self.count])

    def starts(self) -> Tensor:
        """Latents [N, 4, h, w] that the edits begin at."""
        return self.of.run(REFERENCE)["latents"][: self.count].roll(1, 0)

    def edit(self, name: str) -> Edit:
        kind, strength = parse_edit(name)
        starts = self.starts().to(self.of.sampler.device)
        mask = centre_mask(*starts.shape[2:]).to(starts.device) if kind == "inpaint" else None
        return Edit(starts, strength, mask)

    def run(self, name: str, method: MethodCall, other_noise: bool = False) -> Tensors:
        """``latents`` [N, 4, h, w] and ``unet_calls`` [N] of ``method``."""
        evaluation, drawn = self.of, self._first(other_noise)
        edit = self.edit(name)

        def compute(rows: slice) -> Tensors:
            noise = evaluation.sampler.noise(rows.stop - rows.start, drawn.seed + rows.start)
            with evaluation.sampler.autocast(evaluation.config.precision):
                made = evaluation.sampler(method, drawn.positives[rows], drawn.negatives[rows], noise, edit=edit[rows])
            return {"latents": made.latents, "unet_calls": torch.full((len(noise),), made.unet_calls)}

        key = {
            "edit": name,
            "sample": evaluation.sample_key(method, drawn),
            "start": evaluation.sample_key(REFERENCE, self._first()),
        }
        label = f"{evaluation.name} {name} {method}{drawn.label}"
        return evaluation.store.get(label, key, self.count, evaluation.config.batch_size, compute)

    def figures(self) -> dict[str, dict[str, Any]]:
        """For every edit, a row a method and ``floor``, the reference's edit with other noise."""
        found: dict[str, dict[str, Any]] = {}
        for name in self.of.config.edits:
            reference = self.run(name, REFERENCE)
            table = {REFERENCE.text: {"unet_calls": float(reference["unet_calls"].mean())}}
            for method in self.methods:
                if method != REFERENCE:
                    table[method.text] = self._row(self.run(name, method), reference)
            table["floor"] = self._row(self.run(name, REFERENCE, other_noise=True), reference)
            found[name] = table
        return found

    def _row(self, made: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Any]:
        pixels, theirs = (self.of.pixels(run["latents"]) for run in (made, reference))
        row: dict[str, Any] = {"unet_calls": float(made["unet_calls"].mean())}
        error = (made["latents"] - reference["latents"]).square().mean((1, 2, 3))
        row |= mean_and_interval("paired_mse", error.cpu().double())
        row |= mean_and_interval("paired_psnr", psnr(pixels, theirs).cpu().double())
        row |= mean_and_interval("paired_ssim", ssim(pixels, theirs).cpu().double())
        network = self.of.features.network
        if network is not None:
            with torch.no_grad():
                distance = map_distance(network.image_maps(pixels), network.image_maps(theirs))
            row |= mean_and_interval("feature_distance", distance)
        return row
