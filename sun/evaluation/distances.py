"""How near a method's pictures are to the reference's: picture by picture, and as a set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cells import Tensors
from .measured import ModelEvaluation
from .metrics import frechet_distance, frechet_interval, kernel_statistics, map_distance, mean_and_interval, psnr, ssim
from .names import REFERENCE, MethodCall
from .negative import agreements
from .prompts import Drawn

PAIRED = ("mse", "psnr", "ssim")


class Distances:
    """The distances of one :class:`~.measured.ModelEvaluation`."""

    def __init__(self, evaluation: ModelEvaluation):
        self.of = evaluation
        self._reference_pixels: dict[int, Tensor] = {}

    def row(self, call: MethodCall) -> dict[str, Any]:
        """Distances of one method, with 95 % intervals over pictures; the times are those of the run itself."""
        return self._row(call, self.of.all_prompts(), call.text)

    def floor(self) -> dict[str, Any]:
        """The same of the reference with other noise."""
        return self._row(REFERENCE, self.of.all_prompts(other_noise=True), "floor")

    def _row(self, call: MethodCall, drawn: Drawn, label: str) -> dict[str, Any]:
        run = self.of.sample(call, drawn)
        out: dict[str, Any] = {
            "unet_calls": float(run["unet_calls"].mean()),
            "seconds": float(run["seconds"].mean()),
        }
        measures = self.measure(call, drawn, label)
        itself = label == REFERENCE.text
        if not itself:
            reference = self.measure(REFERENCE, self.of.all_prompts(), REFERENCE.text)
            for name in PAIRED:
                out |= mean_and_interval(f"paired_{name}", measures[name].double())
            # a few pictures make most of the mean
            out["median_mse"] = out["paired_mse_median"] = float(measures["mse"].double().median())
            out["psnr"] = out["paired_psnr"]
            own, theirs = measures["features"], reference["features"]
            out["set_distance"] = frechet_distance(own, theirs)
            if self.of.config.set_draws:
                out["set_distance_interval"] = frechet_interval(own, theirs, self.of.config.set_draws)
            out["kid"], out["kid_deviation"] = kernel_statistics(own, theirs)
        for name in ("feature_distance", "positive_agreement", "negative_agreement"):
            if name in measures and not (itself and name == "feature_distance"):
                out |= mean_and_interval(name, measures[name])
        return out

    def measure(self, call: MethodCall, drawn: Drawn, label: str) -> Tensors:
        """A row a picture: ``mse``, ``psnr``, ``ssim``, ``feature_distance``, agreements, and ``features`` [N, D]."""
        evaluation = self.of
        features, network = evaluation.features, evaluation.features.network
        latents, reference = evaluation.sample(call, drawn)["latents"], evaluation.run(REFERENCE)["latents"]
        key = {
            "sample": evaluation.sample_key(call, drawn),
            "reference": evaluation.sample_key(REFERENCE, evaluation.all_prompts()),
            "vae": evaluation.vae_key,
            "features": [features.name, features.print, features.sets],
            "negatives": drawn.negatives,
        }

        def compute(rows: slice) -> Tensors:
            pixels, theirs = evaluation.pixels(latents[rows]), self._reference(reference[rows], rows.start)
            out = {
                "mse": (latents[rows] - reference[rows]).square().mean((1, 2, 3)),
                "psnr": psnr(pixels, theirs),
                "ssim": ssim(pixels, theirs),
                "features": self._of_sets(pixels, latents[rows]),
            }
            if network is not None:
                with torch.no_grad():
                    out["feature_distance"] = map_distance(network.image_maps(pixels), network.image_maps(theirs))
                    out |= agreements(network, pixels, drawn.positives[rows], drawn.negatives[rows])
            return out

        size = evaluation.config.batch_size
        return evaluation.store.get(f"{evaluation.name} {label} measures", key, len(latents), size, compute)

    @torch.no_grad()
    def _of_sets(self, pixels: Tensor, latents: Tensor) -> Tensor:
        features = self.of.features
        with self.of.sampler.autocast(self.of.config.precision if features.network is None else "fp32"):
            return features.of_sets(pixels, latents).float()

    def _reference(self, latents: Tensor, begin: int) -> Tensor:
        """Decoded once and kept as bytes: every method is compared with the same pictures."""
        if begin not in self._reference_pixels:
            self._reference_pixels[begin] = ((self.of.pixels(latents) + 1) * 127.5).round().byte().cpu()
        return self._reference_pixels[begin].to(self.of.sampler.device).float() / 127.5 - 1
