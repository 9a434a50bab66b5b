"""All figures of one model: samples, measures, negatives and times, each computed once (see ``cells.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.identity import fingerprint
from .accelerators import plan_of
from .cells import CellStore, Tensors, digest, fingerprint_module
from .config import EvaluateConfig, method_names
from .edits import Edits
from .features import Features
from .methods import REFERENCE, MethodCall, parse_method
from .metrics import frechet_distance, frechet_interval, kernel_statistics, map_distance, mean_and_interval, psnr, ssim
from .negative import agreement_changes, compare_change
from .prompts import PromptSet
from .sampler import Sampler
from .timing import time_methods, time_unet_calls, timing_conditions

FORMAT = 1  # of the cells; raise it when what is computed changes
OTHER_NOISE = 1_000_000  # added to the seed for the floor
PAIRED = ("mse", "psnr", "ssim")


class ModelEvaluation:
    """One model under all methods. ``name`` labels its cells; distances are to :data:`~.methods.REFERENCE`."""

    def __init__(
        self, name: str, sampler: Sampler, prompts: PromptSet, config: EvaluateConfig, store: CellStore,
        features: Features, methods: list[str] | None = None,
    ):  # fmt: skip
        self.name, self.sampler, self.prompts, self.config = name, sampler, prompts, config
        self.store, self.features = store, features
        self.methods = method_names(config) if methods is None else methods
        self._base_key = {
            "format": FORMAT,
            "unet": fingerprint_module(sampler.unet),
            "text_encoder": fingerprint_module(sampler.text_encoder),
            "scheduler": dict(sampler.scheduler_config),
            "size": sampler.latent_size,
            "precision": config.precision,
        }
        self._vae = fingerprint_module(sampler.vae)
        # before anything is attached, which may change an adapter's number format
        every = {REFERENCE, config.negative_ceiling or REFERENCE, *self.methods}
        self._assets = {m: asset_fingerprint(sampler, m) for m in every}
        self._reference_pixels: dict[int, Tensor] = {}

    def methods_among(self, chosen: Sequence[str]) -> list[str]:
        """This model's methods that are ``chosen``, in their order; all of them if none is."""
        return [method for method in self.methods if not chosen or method in chosen]

    # --- samples -------------------------------------------------------------------------------------------------

    def sample_key(self, method: str, positives: list[str], negatives: list[str], seed: int) -> dict[str, Any]:
        """All that the latents of a method depend on."""
        call = parse_method(method)
        return {
            **self._base_key,
            "method": method,
            "asset": self._assets[method],
            "w": self.sampler.w if call.method.guided or self._takes_guidance(call) else None,
            "positives": positives,
            "negatives": negatives if call.method.uses_negative else None,
            "seed": seed,
        }

    def _takes_guidance(self, call: MethodCall) -> bool:
        """Whether the method's adapter takes the guidance scale as an input."""
        adapter = self.sampler.assets.adapter_of(call)
        return adapter is not None and adapter.guided

    def sample(self, method: str, positives: list[str], negatives: list[str], seed: int, label: str = "") -> Tensors:
        """``latents`` [N, 4, h, w], ``unet_calls`` [N] and ``seconds`` [N] (of the run that made them)."""

        def compute(rows: slice) -> Tensors:
            noise = self.sampler.noise(rows.stop - rows.start, seed + rows.start)
            with self.sampler.autocast(self.config.precision):
                made = self.sampler(method, positives[rows], negatives[rows], noise)
            return {
                "latents": made.latents,
                "unet_calls": torch.full((len(noise),), made.unet_calls),
                "seconds": torch.full((len(noise),), made.seconds),
            }

        key = self.sample_key(method, positives, negatives, seed)
        return self.store.get(f"{self.name} {method}{label}", key, len(positives), self.config.batch_size, compute)

    def run(self, method: str) -> Tensors:
        """The sample of all prompts with their own negatives; ``floor`` is the reference with other noise."""
        if method == "floor":
            seed = self.config.seed + OTHER_NOISE
            return self.sample(REFERENCE, self.prompts.positives, self.prompts.negatives, seed, " other noise")
        return self.sample(method, self.prompts.positives, self.prompts.negatives, self.config.seed)

    # --- measures ------------------------------------------------------------------------------------------------

    def measure(self, method: str) -> Tensors:
        """A row a picture: ``mse``, ``psnr``, ``ssim``, ``feature_distance``, agreements, and ``features`` [N, D]."""
        latents, reference = self.run(method)["latents"], self.run(REFERENCE)["latents"]
        prompts = self.prompts
        kind, offset = (REFERENCE, OTHER_NOISE) if method == "floor" else (method, 0)
        texts, seed = (prompts.positives, prompts.negatives), self.config.seed
        key = {
            "sample": self.sample_key(kind, *texts, seed + offset),
            "reference": self.sample_key(REFERENCE, *texts, seed),
            "vae": self._vae,
            "features": [self.features.name, self.features.print, self.features.sets],
            "negatives": prompts.negatives,
        }

        def compute(rows: slice) -> Tensors:
            pixels, theirs = self.pixels(latents[rows]), self._reference(reference[rows], rows.start)
            out = {
                "mse": (latents[rows] - reference[rows]).square().mean((1, 2, 3)),
                "psnr": psnr(pixels, theirs),
                "ssim": ssim(pixels, theirs),
                "features": self._of_sets(pixels, latents[rows]),
            }
            if self.features.network is not None:
                with torch.no_grad():
                    network = self.features.network
                    out["feature_distance"] = map_distance(network.image_maps(pixels), network.image_maps(theirs))
                    out |= self._agreements(pixels, prompts.positives[rows], prompts.negatives[rows])
            return out

        return self.store.get(f"{self.name} {method} measures", key, len(latents), self.config.batch_size, compute)

    @torch.no_grad()
    def _of_sets(self, pixels: Tensor, latents: Tensor) -> Tensor:
        with self.sampler.autocast(self.config.precision if self.features.network is None else "fp32"):
            return self.features.of_sets(pixels, latents).float()

    def pixels(self, latents: Tensor) -> Tensor:
        """Decoded [B, 3, H, W] in -1..1, in the evaluation's number format."""
        with self.sampler.autocast(self.config.precision):
            return self.sampler.pixels(latents)

    def _reference(self, latents: Tensor, begin: int) -> Tensor:
        """Decoded once and kept as bytes: every method is compared with the same pictures."""
        if begin not in self._reference_pixels:
            self._reference_pixels[begin] = ((self.pixels(latents) + 1) * 127.5).round().byte().cpu()
        return self._reference_pixels[begin].to(self.sampler.device).float() / 127.5 - 1

    def _agreements(self, pixels: Tensor, positives: list[str], negatives: list[str]) -> Tensors:
        """Cosines [N] with the prompt and with the negative; not a number where the negative is empty."""
        network = self.features.network
        assert network is not None
        images = network.image_features(pixels)
        positive, negative = ((images * network.text_features(texts)).sum(1) for texts in (positives, negatives))
        empty = torch.tensor([not text for text in negatives], device=negative.device)
        return {"positive_agreement": positive, "negative_agreement": negative.masked_fill(empty, torch.nan)}

    # --- figures -------------------------------------------------------------------------------------------------

    def row(self, method: str) -> dict[str, Any]:
        """Distances of one method, with 95 % intervals over pictures; the times are those of the run itself."""
        run = self.run(method)
        out: dict[str, Any] = {
            "unet_calls": float(run["unet_calls"].mean()),
            "seconds": float(run["seconds"].mean()),
        }
        measures, reference = self.measure(method), self.measure(REFERENCE)
        if method != REFERENCE:
            for name in PAIRED:
                out |= mean_and_interval(f"paired_{name}", measures[name].double())
            out["paired_mse_median"] = float(measures["mse"].double().median())  # a few pictures make most of the mean
            own, theirs = measures["features"], reference["features"]
            out["set_distance"] = frechet_distance(own, theirs)
            if self.config.set_draws:
                out["set_distance_interval"] = frechet_interval(own, theirs, self.config.set_draws)
            out["kid"], out["kid_deviation"] = kernel_statistics(own, theirs)
        for name in ("feature_distance", "positive_agreement", "negative_agreement"):
            if name in measures and not (method == REFERENCE and name == "feature_distance"):
                out |= mean_and_interval(name, measures[name])
        return out

    def figures(self) -> dict[str, Any]:
        """``reference``, ``methods``, ``floor``, ``negative_prompt``, ``unet_call``, and what they are of."""
        config = self.config
        every = dict.fromkeys((REFERENCE, *self.methods))
        rows = {method: self.row(method) if "distances" in config.measure else {} for method in every}
        if "time" in config.measure:
            times = self.times()
            for method, row in rows.items():
                row |= times["methods"][method]
        out: dict[str, Any] = {
            "reference": {"method": REFERENCE, **rows[REFERENCE]},
            "methods": {method: rows[method] for method in self.methods},
        }
        if "distances" in config.measure:
            out["floor"] = {**self.row("floor"), "what": "the reference again with other noise"}
        if "negatives" in config.measure:
            out["negative_prompt"] = self.negative_prompt()
        if "edits" in config.measure:
            out["edits"] = Edits(self).figures(OTHER_NOISE)
        if "time" in config.measure:
            out |= {"unet_call": times["unet_call"], "machine": times["machine"]}
        return out | {
            "guidance_scale": self.sampler.w,
            "pictures": len(self.prompts.positives),
            "features": self.features.name,
            "set_features": self.features.sets,
        }

    # --- time ----------------------------------------------------------------------------------------------------

    def times(self) -> dict[str, Any]:
        """Times of every method and of one U-Net call, measured by the main process alone."""
        config, batch = self.config, min(self.config.timing_batch, len(self.prompts.positives))
        methods = list(dict.fromkeys((REFERENCE, *self.methods)))
        prompts, negatives = self.prompts.positives[:batch], self.prompts.negatives[:batch]
        machine = timing_conditions(self.sampler, batch, config.precision)

        def make() -> dict[str, Any]:
            found = time_methods(self.sampler, methods, prompts, negatives, config.timing_rounds, config.precision)
            calls = time_unet_calls(
                self.sampler, methods, prompts, negatives, 4 * config.timing_rounds, config.precision
            )
            rows = {method: timing.figures(found[REFERENCE]) for method, timing in found.items()}
            return {"methods": rows, "unet_call": calls, "machine": machine}

        key = {**self._base_key, "methods": methods, "machine": machine, "rounds": config.timing_rounds,
               "assets": [self._assets[m] for m in methods]}  # fmt: skip
        return self.store.note(f"{self.name} times", key, make)

    # --- negative prompts ----------------------------------------------------------------------------------------

    def negative_prompt(self) -> dict[str, Any]:
        """With and without the negative, method by method (see ``negative.py``).

        The rows of the first group are at the top; each group also has its own table, and ``ceiling`` holds the
        reference by another solver and with other noise, compared with the reference in the same way.
        """
        config, groups = self.config, self.prompts.groups
        chosen = self.methods_among(config.negative_methods)
        methods = [m for m in chosen if parse_method(m).method.uses_negative and m != REFERENCE]
        tables = {name: self._negative_table(methods, negatives) for name, negatives in groups.items()}
        first = next(iter(tables.values()), {})
        out: dict[str, Any] = {"pairs": len(next(iter(groups.values()), [])), **first, "groups": tables}
        if config.negative_ceiling and groups:
            negatives = next(iter(groups.values()))
            reference = self._change(REFERENCE, negatives, config.seed)
            out["ceiling"] = {
                config.negative_ceiling: compare_change(
                    self._change(config.negative_ceiling, negatives, config.seed), reference
                ),
                "other noise": compare_change(self._change(REFERENCE, negatives, config.seed + OTHER_NOISE), reference),
            }
        return out

    def _negative_table(self, methods: list[str], negatives: list[str]) -> dict[str, Any]:
        seed = self.config.seed
        reference = self._change(REFERENCE, negatives, seed)
        table: dict[str, Any] = {}
        for method in (REFERENCE, *methods):
            row: dict[str, Any] = {}
            if method != REFERENCE:
                row |= compare_change(self._change(method, negatives, seed), reference)
            if self.features.network is not None:
                row |= agreement_changes(self._seen(method, negatives), self._seen(method, negatives, without=True))
            if row:
                table[method] = row
        return table

    def _pair(self, method: str, negatives: list[str], seed: int) -> Tensor:
        positives = self.prompts.positives[: len(negatives)]
        label = " negatives" if any(negatives) else " no negatives"
        return self.sample(method, positives, negatives, seed, label)["latents"]

    def _change(self, method: str, negatives: list[str], seed: int) -> Tensor:
        return self._pair(method, negatives, seed) - self._pair(method, [""] * len(negatives), seed)

    def _seen(self, method: str, negatives: list[str], without: bool = False) -> Tensors:
        """Agreements of pictures made with or without ``negatives``, in both cases with these negatives' texts."""
        used = [""] * len(negatives) if without else negatives
        latents = self._pair(method, used, self.config.seed)
        positives = self.prompts.positives[: len(negatives)]
        key = {
            "sample": self.sample_key(method, positives, used, self.config.seed),
            "texts": negatives, "vae": self._vae, "features": [self.features.name, self.features.print],
        }  # fmt: skip

        def compute(rows: slice) -> Tensors:
            with torch.no_grad():
                return self._agreements(self.pixels(latents[rows]), positives[rows], negatives[rows])

        return self.store.get(f"{self.name} {method} agreements", key, len(latents), self.config.batch_size, compute)


def asset_fingerprint(sampler: Sampler, method: str) -> str:
    """Fingerprint of the files a method adds to the model: its adapter, LoRA or U-Net."""
    call, assets = parse_method(method), sampler.assets
    added = digest(sampler.calibration) if "ltc" in call.method.name else ""
    added += str(plan_of(call)) if call.method.presets else ""
    if call.method.adapter:
        adapter = assets.adapter_of(call)
        return added if adapter is None else added + fingerprint_module(adapter)
    if added:
        return added
    folder = {"lcm-lora": assets.lcm_lora, "guided-distill": assets.guided_distill}.get(call.method.name, "")
    if not folder:
        return ""
    # of a training run's folder the weights alone, not its checkpoints
    weights = (Path(folder) / "pytorch_lora_weights.safetensors", Path(folder) / "unet", Path(folder))
    return fingerprint(next((path for path in weights if path.exists()), Path(folder)))
