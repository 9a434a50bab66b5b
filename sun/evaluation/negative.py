"""Does the negative prompt steer? With and without it, all else equal (the paper's Fig. 5, in figures).

The change of latents that a negative causes is compared with the change it causes in the reference: direction
(cosine) and size. With an image-text model, also how far it moves the picture from both prompts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .metrics import bootstrap_interval, mean_and_interval

Agreements = dict[str, Tensor]
"""``positive_agreement`` and ``negative_agreement`` [N] of pictures with the prompt and with the negative."""


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
