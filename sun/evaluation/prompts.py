"""What is drawn: prompts with random negatives, and the negatives of the experiment on negative prompts."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..common import worlds
from ..common.settings import ConfigError, read_lines
from ..common.worlds import EMOJI, PHOTO
from .config import EvaluateConfig


@dataclass
class PromptSet:
    """``groups``: for each name a negative prompt, never empty, for each of the first prompts."""

    positives: list[str]
    negatives: list[str]
    groups: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Drawn:
    """What is drawn: texts, the seed of the first picture's noise, and a word for the cell's name."""

    positives: list[str]
    negatives: list[str]
    seed: int
    label: str = ""

    def __len__(self) -> int:
        return len(self.positives)


def build_prompts(config: EvaluateConfig) -> PromptSet:
    """Prompts with random negatives: from a file, or emoji scenes that training did not render.

    Random negatives for emoji do not contradict the prompt's background (see ``consistent_negative`` of its world).
    """
    rng = random.Random(config.seed)
    if config.prompts_file:
        positives, negatives = read_pairs(Path(config.prompts_file), config.prompts)
        source, scenes = worlds.find(PHOTO, "negatives").load(config.negatives, PHOTO, 8, 0.0), []
        consistent = _as_written
    else:
        captions, consistent = worlds.find(EMOJI, "prompts"), worlds.find(EMOJI, "consistent_negative")
        positives = captions(config.prompts, rng)
        source = worlds.find(EMOJI, "negatives").load(config.negatives, EMOJI, 6, 0.1)
        negatives = [consistent(source.draw(rng), prompt) for prompt in positives]
        scenes = captions(config.negative_pairs, rng)
    beside = positives[: config.negative_pairs]
    groups = {name: _group(name, beside, source.phrases, scenes, consistent, rng) for name in config.negative_groups}
    return PromptSet(positives, negatives, groups)


def _as_written(negative: str, prompt: str) -> str:
    return negative


def calibration_pairs(config: EvaluateConfig) -> list[tuple[str, str]]:
    """Prompts and negatives that LTC-Accel is calibrated on: others than the measured ones, where there are others.

    Of a file they are those after the measured ones, else its last.
    """
    if config.prompts_file:
        positives, negatives = read_pairs(Path(config.prompts_file), config.prompts + config.calibration_prompts)
        return list(zip(positives, negatives, strict=True))[-config.calibration_prompts :]
    other = replace(
        config, seed=config.seed + 1, prompts=config.calibration_prompts, negative_pairs=0, negative_groups=()
    )
    found = build_prompts(other)
    return list(zip(found.positives, found.negatives, strict=True))


def read_pairs(path: Path, count: int) -> tuple[list[str], list[str]]:
    """The first ``count`` prompts and negatives of a file with ``prompt | negative`` a line. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(
            f"prompts_file = {path} does not exist. Give a text file with one 'prompt | negative' a line."
        )
    lines = [line for line in read_lines(path) if line.strip()][:count]
    if len(lines) < 2:
        raise ConfigError(f"{path} holds {len(lines)} prompts; distances of sets need two at least, better 500.")
    pairs = [line.partition("|")[::2] for line in lines]
    return [p.strip() for p, _ in pairs], [n.strip() for _, n in pairs]


def _group(
    name: str,
    positives: list[str],
    phrases: list[str],
    scenes: list[str],
    consistent: Callable[[str, str], str],
    rng: random.Random,
) -> list[str]:
    """``seen``: one to a few phrases of the training list. ``unseen``: what that list cannot make.

    For emoji an unseen negative is the caption of another scene; otherwise the first words of one phrase with the
    last of another, which are in no phrase together.
    """
    if name == "seen":
        fitting = [[phrase for phrase in phrases if consistent(phrase, prompt)] for prompt in positives]
        return [", ".join(rng.sample(some, rng.randint(1, min(4, len(some))))) for some in fitting]
    if name == "unseen":
        if not scenes:
            return [_recombined(phrases, rng) for _ in positives]
        return [consistent(scene, prompt) for scene, prompt in zip(scenes, positives, strict=False)]
    raise ConfigError(f"negative_groups takes seen and unseen, not {name!r}.")


def _recombined(phrases: list[str], rng: random.Random, tries: int = 50) -> str:
    known, text = set(phrases), ""
    for _ in range(tries):
        first, last = rng.choice(phrases).split()[0], rng.choice(phrases).split()[-1]
        text = f"{first} {last}"
        if first != last and text not in known:
            break
    return text
