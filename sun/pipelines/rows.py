"""Which of a pipeline's prompts each row of a U-Net call belongs to.

Pipelines lay out rows in their own ways: an image after the other, a video's frames side by side, a whole batch once
more for perturbed attention. Which it is shows in the text states that they hand to the U-Net.
"""

from __future__ import annotations

import torch
from torch import Tensor


class OwnGuidance(Exception):
    """Rows of a U-Net call are the negative prompt: the pipeline runs classifier-free guidance."""


def which_rows(text: Tensor, positive: Tensor, negative: Tensor, frames: int = 1) -> list[int] | None:
    """For each row of ``text`` [N, L, D] the row of ``positive`` [P, L, D] it is; None if it is none of them.

    frames: of a video, in a U-Net over time. Where several prompts are the same, the layouts of diffusers' pipelines
    decide. Raises OwnGuidance where rows are of ``negative`` and of no positive prompt.
    """
    if text.shape[1:] != positive.shape[1:]:
        return None
    positive = positive.to(text)
    for layout in layouts(len(text), len(positive), frames):
        if torch.equal(text, positive[layout]):
            return layout
    found, known = _matches(text, positive)
    if bool(known.all()):
        return [int(i) for i in found]
    if negative.shape[1:] == text.shape[1:] and bool(_matches(text, negative.to(text))[1][~known].any()):
        raise OwnGuidance
    return None


def layouts(rows: int, prompts: int, frames: int = 1) -> list[list[int]]:
    """In which orders diffusers' pipelines lay out so many prompts in so many rows, the likeliest first.

    A whole batch after the other, each prompt's frames together; row by row; or each prompt's rows together.
    """
    if not prompts or rows % prompts:
        return []
    found = [[row % prompts for row in range(rows)], [row * prompts // rows for row in range(rows)]]
    if rows % (prompts * frames) == 0:
        found.insert(0, [row // frames % prompts for row in range(rows)])
    return found


def _matches(text: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of ``text`` the first of ``prompts`` that it equals, and whether it equals any."""
    same = torch.stack([(text == prompt).flatten(1).all(1) for prompt in prompts])
    return same.int().argmax(0), same.any(0)
