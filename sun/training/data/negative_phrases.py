"""Negative prompts for training: 0 to many phrases of a list, joined with commas (the paper samples 0-100 of 832)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from ...common.reading import ReadError, read_text
from ...common.worlds import world_of
from .samples import DataError

_LISTS = Path(__file__).parent / "phrases"


@dataclass
class NegativePrompts:
    """``draw`` gives one negative prompt; the empty one occurs with ``empty_probability`` and by drawing 0 phrases."""

    phrases: list[str]
    max_phrases: int
    empty_probability: float

    @classmethod
    def load(cls, source: str, data: str, max_phrases: int, empty_probability: float) -> NegativePrompts:
        """``source`` is a text file with a phrase a line, or ``auto``: the list that fits the data.

        Raises FileNotFoundError, or DataError for a file without a phrase.
        """
        path = Path(source) if source != "auto" else _LISTS / f"{world_of(data)}.txt"
        if not path.exists():
            raise FileNotFoundError(
                f"no list of negative phrases at {path}: give a text file with one phrase a line, or auto."
            )
        try:
            lines = (line.strip() for line in read_text(path).split("\n"))
        except ReadError as error:
            raise DataError(str(error)) from error
        phrases = list(dict.fromkeys(line for line in lines if line))
        if not phrases:
            raise DataError(
                f"{path} has no phrase: an adapter trained on empty negatives alone does not obey negative prompts. "
                "Write one phrase a line."
            )
        return cls(phrases, min(max_phrases, len(phrases)), empty_probability)

    def draw(self, rng: random.Random) -> str:
        if rng.random() < self.empty_probability:
            return ""
        return ", ".join(rng.sample(self.phrases, rng.randint(0, self.max_phrases)))
