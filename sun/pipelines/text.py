"""Prompts to the text states a U-Net takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def encode_texts(tokenizer: Any, text_encoder: Any, texts: list[str]) -> Tensor:
    """Text states [B, L, D] of prompts, padded or cut to the tokenizer's length (77), on the encoder's device."""
    length = tokenizer.model_max_length
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    return text_encoder(ids.to(next(text_encoder.parameters()).device))[0]
