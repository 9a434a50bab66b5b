"""Prompts to the text states a U-Net takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def encode_texts(tokenizer: Any, text_encoder: Any, texts: list[str]) -> Tensor:
    """Text states [B, L, D] of prompts, padded or cut to the tokenizer's length (77), on the encoder's device."""
    length = tokenizer.model_max_length
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    return text_encoder(ids.to(next(text_encoder.parameters()).device))[0]


def match_rows(text: Tensor, rows: int) -> Tensor:
    """Text states [B, L, D] with one row for each of ``rows``: a host's batch may hold every image several times.

    Rows repeat as a whole, image 0, 1, ..., 0, 1, ... Raises ValueError if ``rows`` is no multiple of B.
    """
    if text.shape[0] == rows:
        return text
    if text.shape[0] == 1:
        return text.expand(rows, -1, -1)
    if rows % text.shape[0] == 0:
        return text.repeat(rows // text.shape[0], 1, 1)
    raise ValueError(
        f"SUN: something changed the batch to {rows} rows, and the negative prompt has {text.shape[0]}, which does not "
        "divide it. Use a batch size of 1 with it."
    )
