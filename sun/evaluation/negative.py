"""Does the negative prompt steer? With and without it, all else equal (the paper's Fig. 5, in figures).

The change of latents that a negative causes is compared with the change it causes in the reference: direction
(cosine) and size. With an image-text model, also how far it moves the picture from both prompts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .cells import Tensors
from .features import FeatureNetwork
from .measured import ModelEvaluation
from .metrics import bootstrap_interval, mean_and_interval
from .names import REFERENCE, MethodCall, parse_method
from .prompts import Drawn

Agreements = dict[str, Tensor]
"""``positive_agreement`` and ``negative_agreement`` [N] of pictures with the prompt and with the negative."""


class Negatives:
    """The experiment on negatives of one :class:`~.measured.ModelEvaluation`: with and without, method by method."""

    def __init__(self, evaluation: ModelEvaluation):
        self.of = evaluation

    def figures(self) -> dict[str, Any]:
        """The rows of the first group are at the top; each group also has its own table, and ``ceiling`` holds the
        reference by another solver and with other noise, compared with the reference in the same way."""
        config, groups = self.of.config, self.of.prompts.groups
        chosen = self.of.methods_among(config.negative_methods)
        methods = [call for call in chosen if call.method.uses_negative and call != REFERENCE]
        tables = {name: self._table(methods, negatives) for name, negatives in groups.items()}
        first = next(iter(tables.values()), {})
        out: dict[str, Any] = {"pairs": len(next(iter(groups.values()), [])), **first, "groups": tables}
        if config.negative_ceiling and groups:
            negatives = next(iter(groups.values()))
            reference = self._change(REFERENCE, negatives)
            solver = self._change(parse_method(config.negative_ceiling), negatives)
            out["ceiling"] = {
                config.negative_ceiling: compare_change(solver, reference),
                "other noise": compare_change(self._change(REFERENCE, negatives, other_noise=True), reference),
            }
        return out

    def _table(self, methods: list[MethodCall], negatives: list[str]) -> dict[str, Any]:
        reference = self._change(REFERENCE, negatives)
        table: dict[str, Any] = {}
        for call in (REFERENCE, *methods):
            row: dict[str, Any] = {}
            if call != REFERENCE:
                row |= compare_change(self._change(call, negatives), reference)
            if self.of.features.network is not None:
                row |= agreement_changes(self._seen(call, negatives), self._seen(call, negatives, without=True))
            if row:
                table[call.text] = row
        return table

    def _drawn(self, negatives: list[str], other_noise: bool = False) -> Drawn:
        whole = self.of.all_prompts(other_noise)
        label = " negatives" if any(negatives) else " no negatives"
        return replace(whole, positives=whole.positives[: len(negatives)], negatives=negatives, label=label)

    def _change(self, call: MethodCall, negatives: list[str], other_noise: bool = False) -> Tensor:
        """Latents with the negatives minus those without."""
        with_them, without = (self._drawn(texts, other_noise) for texts in (negatives, [""] * len(negatives)))
        return self.of.sample(call, with_them)["latents"] - self.of.sample(call, without)["latents"]

    def _seen(self, call: MethodCall, negatives: list[str], without: bool = False) -> Tensors:
        """Agreements of pictures made with or without ``negatives``, in both cases with these negatives' texts."""
        evaluation, features = self.of, self.of.features
        drawn = self._drawn([""] * len(negatives) if without else negatives)
        latents = evaluation.sample(call, drawn)["latents"]
        key = {
            "sample": evaluation.sample_key(call, drawn),
            "texts": negatives,
            "vae": evaluation.vae_key,
            "features": [features.name, features.print],
        }

        def compute(rows: slice) -> Tensors:
            assert features.network is not None
            with torch.no_grad():
                pixels = evaluation.pixels(latents[rows])
                return agreements(features.network, pixels, drawn.positives[rows], negatives[rows])

        label = f"{evaluation.name} {call} agreements"
        return evaluation.store.get(label, key, len(latents), evaluation.config.batch_size, compute)


def agreements(network: FeatureNetwork, pixels: Tensor, positives: list[str], negatives: list[str]) -> Agreements:
    """Cosines [N] with the prompt and with the negative; not a number where the negative is empty."""
    images = network.image_features(pixels)
    positive, negative = ((images * network.text_features(texts)).sum(1) for texts in (positives, negatives))
    empty = torch.tensor([not text for text in negatives], device=negative.device)
    return {"positive_agreement": positive, "negative_agreement": negative.masked_fill(empty, torch.nan)}


def compare_change(change: Tensor, reference: Tensor) -> dict[str, Any]:
    """How the latents' change [N, 4, h, w] of a method follows the reference's.

    ``cosine`` is the mean over pictures, ``cosine_with_other_pairs_change`` the same against the neighbour's change:
    what agreement comes from anything but this picture's negative.
    """
    change, reference = change.flatten(1), reference.flatten(1)
    cosine = torch.cosine_similarity(change, reference, dim=1)
    control = torch.cosine_similarity(change, reference.roll(1, 0), dim=1)
    return {
        "cosine": float(cosine.mean()),
        "interval": bootstrap_interval(cosine),
        "positive_share": float((cosine > 0).float().mean()),
        "cosine_with_other_pairs_change": float(control.mean()),
        "relative_size": float(change.norm(dim=1).mean() / reference.norm(dim=1).mean()),
    }


def agreement_changes(with_negative: Agreements, without: Agreements) -> dict[str, Any]:
    """Mean change of the cosine with the prompt and with the negative, and their intervals; empty without a network.

    A negative that works lowers the second and barely moves the first.
    """
    out: dict[str, Any] = {}
    for name in ("positive_agreement", "negative_agreement"):
        if name in with_negative:
            out |= mean_and_interval(f"{name}_change", with_negative[name] - without[name])
    return out
