"""Captions: texts that describe a picture, or a reason why something is none.

They come from text files beside pictures, from rows of metadata and from the samples of shards, and are read alike.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...common.reading import ReadError, decode_text, parse_json, read_text

MAX_CAPTION = 2**16  # bytes; the longest a person wrote has a few thousand
# What no caption holds: control characters, halves of a character, and the sign that stands for an undecodable one.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffd]")


class NoCaption(ValueError):
    """Something that is no caption; the message says why, to follow the name of the file or row."""


def caption_of(value: Any) -> str:
    """``value`` of a row as a caption; "" where there is none. Raises NoCaption for what is no text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
        raise NoCaption(f"has {kind.get(type(value), type(value).__name__)} for a caption where a text belongs")
    if len(value) > MAX_CAPTION:
        raise NoCaption(f"has a caption of {len(value):,} characters")
    if found := _NO_TEXT.search(value):
        raise NoCaption(
            f"has the character U+{ord(found[0]):04X} in its caption: it was read or saved in another encoding"
        )
    return value.strip()


def read_caption(file: Path) -> str:
    """The caption in a text file. Raises NoCaption, OSError."""
    try:
        return caption_of(read_text(file, MAX_CAPTION))
    except ReadError as error:
        raise NoCaption(_after(str(error), file)) from error


def decode_caption(content: bytes, name: str) -> str:
    """The caption in a shard's member. Raises NoCaption."""
    if len(content) > MAX_CAPTION:
        raise NoCaption(f"has {len(content):,} bytes")
    try:
        return caption_of(decode_text(content, name))
    except ReadError as error:
        raise NoCaption(_after(str(error), name)) from error


def caption_of_row(content: bytes, name: str) -> str:
    """``caption`` or ``text`` of a JSON object, as img2dataset writes them, or "". Raises NoCaption."""
    try:
        row = parse_json(content, name)
    except ReadError as error:
        raise NoCaption(_after(str(error), name)) from error
    if not isinstance(row, dict):
        raise NoCaption("holds no JSON object with a caption")
    return caption_of(row.get("caption")) or caption_of(row.get("text"))


def _after(sentence: str, name: Path | str) -> str:
    """What a sentence says after the name that it begins with, without its full stop."""
    return sentence.removeprefix(str(name)).strip().rstrip(".")
