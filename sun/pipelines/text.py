"""Prompts to the text states a U-Net takes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MAX_BLOCKS = 32
"""Blocks of a tokenizer's length that one prompt may take: 2,400 tokens, far beyond what anybody writes."""
# What web UIs and ComfyUI read as more than words, and what to do instead.
_SYNTAX = (
    (re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>"), "LoRAs are given as files (--lora PATH:WEIGHT)"),
    (
        re.compile(r"\((?:[^()]|\\[()])*:\s*-?\d*\.?\d+\s*\)|\(\([^()]*\)\)"),
        "weights are read with --prompt-weights compel, as (red)1.3",
    ),
    (re.compile(r"\[[^\[\]]*:[^\[\]]*:?\s*\d*\.?\d+\s*\]"), "a prompt does not change during a run here"),
    (re.compile(r"\bembedding:[\w./-]+"), "textual inversions are not read here"),
    (re.compile(r"\bBREAK\b|\bAND\b(?=\s)"), "it is a word here"),
    (re.compile(r"\{[^{}|]*\|[^{}]*\}|__[\w/-]+__"), "no words are chosen at random here"),
)


def encode_texts(tokenizer: Any, text_encoder: Any, texts: list[str]) -> Tensor:
    """Text states [B, L, D] of captions, padded or cut to the tokenizer's length L (77), on the encoder's device."""
    length = tokenizer.model_max_length
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    return text_encoder(ids.to(next(text_encoder.parameters()).device))[0]


def encode_prompts(tokenizer: Any, text_encoder: Any, *groups: Sequence[str]) -> tuple[Tensor, ...]:
    """Text states [B, n L, D] of each group of prompts, nothing cut, all of one length, on the encoder's device.

    A prompt of more tokens than the encoder takes (75 and its two ends) is encoded in blocks that are put one after the
    other, as ComfyUI does. Shorter ones are repeated up to the longest (to the lowest common multiple): attention over
    the same tokens twice is attention over them once, so a prompt's states do not depend on what it is beside of.
    Raises ValueError for a prompt longer than ``MAX_BLOCKS``.
    """
    blocks = [[token_blocks(tokenizer, text) for text in texts] for texts in groups]
    device = next(text_encoder.parameters()).device
    found = []
    for group in blocks:
        rows = [ids for text in group for ids in text]
        encoded = iter(text_encoder(torch.tensor(rows, device=device))[0])
        found.append([torch.cat([next(encoded) for _ in text]) for text in group])
    return of_one_length(found)


def of_one_length(groups: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """States [n L, D] of texts as one tensor [B, m L, D] a group, all repeated to one length."""
    counts = [len(states) for group in groups for states in group]
    length = math.lcm(*counts)
    return tuple(torch.stack([states.repeat(length // len(states), 1) for states in group]) for group in groups)


def token_blocks(tokenizer: Any, text: str) -> list[list[int]]:
    """Token ids of ``text`` in blocks of the tokenizer's length, each with its begin, end and padding; one at least.

    Raises ValueError for a text longer than ``MAX_BLOCKS``.
    """
    space = tokenizer.model_max_length - 2
    ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    if len(ids) > MAX_BLOCKS * space:
        raise ValueError(f"the prompt has {len(ids)} tokens; at most {MAX_BLOCKS * space} are read. Shorten it.")
    parts = [ids[i : i + space] for i in range(0, len(ids), space)] or [[]]
    padding = [tokenizer.pad_token_id]
    return [[tokenizer.bos_token_id, *part, tokenizer.eos_token_id, *padding * (space - len(part))] for part in parts]


def answer_to_text_model(text_encoder: Any) -> None:
    """Let a text encoder answer to ``text_model``, where diffusers to 0.42 looks for the last norm for ``clip_skip``.

    transformers 5.6 took that layer away. The name is no submodule, which would be its own: nothing is saved or moved
    twice.
    """
    if isinstance(text_encoder, torch.nn.Module) and not hasattr(text_encoder, "text_model"):
        text_encoder.__dict__["text_model"] = text_encoder


def cut_by_encoder(tokenizer: Any, text: str) -> str:
    """What of ``text`` a pipeline that knows one block alone leaves out; usually nothing."""
    ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return str(tokenizer.decode(ids[tokenizer.model_max_length - 2 :])).strip()


def read_as_words(text: str) -> list[str]:
    """Sentences about parts of a prompt that other programs act on and that are only words to a text encoder."""
    found = []
    for pattern, instead in _SYNTAX:
        if match := pattern.search(text):
            found.append(f"{match[0]!r} in the prompt is read as words: {instead}.")
    return found
