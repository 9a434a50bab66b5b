"""Prompts with weights, as compel reads them: ``(red)1.3``, ``red++``, ``("a cat", "ink").and()``.

compel (https://github.com/damian0815/compel) is a library of its own: ``pip install compel``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .text import of_one_length, token_blocks

MISSING = (
    "weights in prompts are read by a library that is not installed. Install it with: pip install compel (or "
    "SUN with its extra `weights`), or leave --prompt-weights out."
)


def encode_weighted(tokenizer: Any, text_encoder: Any, *groups: Sequence[str]) -> tuple[Tensor, ...]:
    """As :func:`sun.pipelines.text.encode_prompts`, with weights: states [B, n L, D] of each group, all of one length.

    A text without weights has the states it has there. Raises ValueError where compel is missing or cannot read a
    prompt, and for one beyond all measure.
    """
    compel = _compel(tokenizer, text_encoder)
    return of_one_length([[_states(compel, tokenizer, text) for text in texts] for texts in groups])


def _compel(tokenizer: Any, text_encoder: Any) -> Any:
    try:
        from compel import Compel
    except ImportError as error:
        raise ValueError(MISSING) from error
    own = next(text_encoder.parameters())
    return Compel(
        tokenizer,
        text_encoder,
        truncate_long_prompts=False,
        dtype_for_device_getter=lambda _device: own.dtype,
        device=own.device,
    )


def _states(compel: Any, tokenizer: Any, text: str) -> Tensor:
    """[n L, D]"""
    token_blocks(tokenizer, text)  # says so if there are too many
    try:
        states: Tensor = compel.build_conditioning_tensor(text)[0]
    except Exception as error:  # its parser's own, and whatever an odd prompt makes of it
        raise ValueError(
            f"the prompt {text[:80]!r} could not be read with weights ({type(error).__name__}: {error}). Weights are "
            "written (red)1.3 or red++; put a backslash before brackets that mean none."
        ) from error
    return states
