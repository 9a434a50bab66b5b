"""A row of a file of prompts: its columns, as values of a recipe."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ...common.reading import ReadError, decode_text, parse_json, printable
from ...common.settings import ConfigError, convert
from ..recipe import Recipe, RecipeError, parse_size

_WHOLE = ("seed", "width", "height", "steps")
_NUMBERS = ("guidance", "sun_strength", "strength", "control_scale")
_TEXTS = ("prompt", "negative", "scheduler", "denoise_mode", "init", "mask", "control")
COLUMNS = ("prompt", "negative", "seed", "size", *_WHOLE[1:], "guidance", *_TEXTS[2:], *_NUMBERS[1:])
_FILES = ("init", "mask", "control")
# What other programs call them.
_OTHER_NAMES = {
    "text": "prompt",
    "caption": "prompt",
    "prompts": "prompt",
    "negative_prompt": "negative",
    "cfg": "guidance",
    "cfg_scale": "guidance",
    "guidance_scale": "guidance",
    "num_inference_steps": "steps",
    "resolution": "size",
    "sampler": "scheduler",
    "image": "init",
}


class RowError(ValueError):
    """A row that cannot be drawn; the message says why, without the row's place."""


@dataclass(frozen=True)
class Row:
    """Row ``index`` (from 0) of a file of prompts, which begins in line ``line`` (from 1)."""

    index: int
    line: int
    recipe: Recipe


@dataclass(frozen=True)
class Failure:
    """A row of which there is no picture, and why. ``kind``: ``row``, ``picture``, ``numbers`` or ``memory``."""

    index: int
    line: int
    kind: str
    reason: str
    prompt: str = ""


@dataclass(frozen=True)
class Form:
    """How rows are written: ``kind`` ``txt``, ``csv`` or ``jsonl``; of ``csv`` the delimiter and the columns."""

    kind: str
    delimiter: str = ","
    columns: tuple[str, ...] = ()

    def values(self, raw: bytes) -> dict[str, Any]:
        """What a row says, by column; columns that are none of ours among them. Raises RowError."""
        try:
            if self.kind == "jsonl":
                content = parse_json(raw.strip(), "it")
                if not isinstance(content, dict):
                    raise RowError('it is no JSON object, as {"prompt": "a cat"}')
                return {str(name): value for name, value in content.items()}
            text = decode_text(raw, "it")
        except ReadError as error:
            raise RowError(str(error).rstrip(".")) from error
        return {"prompt": text.strip()} if self.kind == "txt" else self._cells(text)

    def _cells(self, text: str) -> dict[str, Any]:
        cells = csv_cells(text, self.delimiter)
        if len(cells) != len(self.columns):
            raise RowError(
                f"it has {len(cells)} value{'s' * (len(cells) != 1)} for {len(self.columns)} columns; leave cells "
                "empty, and put texts that hold commas, quotes or line ends in quotes"
            )
        return dict(zip(self.columns, cells, strict=True))


def csv_cells(text: str, delimiter: str) -> list[str]:
    """The cells of one record. Raises RowError."""
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    except csv.Error as error:
        raise RowError(f"it cannot be read ({error})") from error


@lru_cache(maxsize=1024)
def unknown(names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of column names those that are probably ours misspelt, each a sentence, and those that are other people's."""
    wrong, others = [], []
    for name in names:
        if name in COLUMNS:
            continue
        close = difflib.get_close_matches(name.lower(), COLUMNS, 1, 0.75)
        near = _OTHER_NAMES.get(name.lower()) or next(iter(close), "")
        if near and near not in names:
            wrong.append(f"the column {_shown(name)} is called {near} here")
        else:
            others.append(name)
    return tuple(wrong), tuple(others)


def recipe_of(values: Mapping[str, Any], base: Recipe, index: int) -> Recipe:
    """The recipe of row ``index``: its values on top of those of the command, which hold where a cell is empty.

    A row without a seed has that of ``base`` plus ``index``. Raises RowError.
    """
    wrong, _ = unknown(tuple(values))
    if wrong:
        raise RowError(wrong[0])
    given = {name: value for name in COLUMNS if not _empty(value := values.get(name))}
    own: dict[str, Any] = {"seed": (base.seed + index) % 2**64}
    try:
        for name, value in given.items():
            kind = int if name in _WHOLE else float if name in _NUMBERS else str
            own[name] = _text(name, value) if kind is str else convert(value, kind, "it")
        _resize(own, base)
        if not own.get("prompt"):
            raise RowError("it has no prompt")
        return replace(base, **own)
    except ConfigError as error:
        raise RowError(f"{name}: {str(error).removeprefix('it ').rstrip('.')}") from error
    except RecipeError as error:
        raise RowError(str(error).rstrip(".")) from error


def _resize(own: dict[str, Any], base: Recipe) -> None:
    """Of ``size`` or ``width`` and ``height`` make both sides."""
    named = {side: own[side] for side in ("width", "height") if side in own}
    if "size" in own:
        sides = parse_size(own.pop("size"))
        own["width"], own["height"] = sides
        for side, length in named.items():
            if length != own[side]:
                raise RowError(f"its size and its {side} are different")
    elif named and not (base.width and base.height) and len(named) == 1:
        raise RowError(f"it has a {next(iter(named))} alone; give both sides, or size as 512x768")


def _text(name: str, value: Any) -> str:
    if name == "size" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(f"{name} = {_shown(value)} is no text")
    if name in _FILES and (value.replace("\\", "/").startswith("//") or "://" in value):
        raise RowError(f"{name} = {_shown(value)} is on another machine; get it, and name the file")
    return value.strip()


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _shown(value: Any) -> str:
    text = printable(repr(value))
    return text if len(text) <= 80 else text[:80] + "..."
