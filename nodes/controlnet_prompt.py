"""What a ControlNet reads: the positive prompt, as everywhere, or both prompts, as the authors' code had it.

ComfyUI has a key for a text that ControlNets alone read; where it is missing they read the positive prompt.
"""

from __future__ import annotations

from typing import Any

import torch

from ..sun.conditioning import repeated_in_turn

FOR_CONTROLNET = "cross_attn_controlnet"


def read_both(positive: list[Any], negative: list[Any]) -> list[Any]:
    """A CONDITIONING whose ControlNets read the tokens of `negative` after those of `positive`, [B, L + L', width].

    Raises ValueError for texts of another width, or none.
    """
    negatives = [entry[0] for entry in negative if entry[0] is not None]
    if not negatives:
        raise ValueError(
            "There is no negative prompt to read. Connect a CLIP Text Encode to negative; it may be empty."
        )
    return [[text, {**options, FOR_CONTROLNET: _in_a_row([text, *negatives])}] for text, options in positive]


def _in_a_row(texts: list[torch.Tensor]) -> torch.Tensor:
    widths = sorted({text.shape[-1] for text in texts})
    if len(widths) > 1:
        raise ValueError(
            f"The two prompts are {widths[0]} and {widths[1]} wide. Encode both with the CLIP of the same model."
        )
    rows = max(len(text) for text in texts)
    return torch.cat([repeated_in_turn(text.to(texts[0]), rows) for text in texts], dim=1)
