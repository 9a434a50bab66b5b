"""Whether pictures of Emoji Diffusion show what was asked for: the judge of ``sun evaluate``'s measure ``agreement``.

A question is "OBJECT, COLOUR background". With negatives, every second one also names another object as unwanted; the
others leave the background open and do not want a white one, which is what the model draws most often where it is free
to choose. A contradicting negative names an object *and* another background than the prompt's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .main_colours import (
    background_tones,
    known_emojis,
    main_colours,
    own_colour_share,
    pixels_to_lab,
    shown_background,
)
from .scenes import BACKGROUNDS
from .sources import Emoji

VERSION = 2  # of the judgement; raise it when pictures are judged in another way
UNWANTED = "white"  # the background that is not wanted where none is named
TELLABLE = 0.6  # share of an emoji's area that differs from the backgrounds it is asked on
APART = 35.0  # CIELAB
MOST = 0.5  # of the frame around a picture is the background, of an object is its own colour
AMONG = 5  # the named object is among this many names that fit the picture best


@dataclass(frozen=True)
class EmojiQuestion:
    """What is asked for. ``background`` is empty where the prompt leaves it open; ``other`` is the unwanted object."""

    emoji: Emoji
    background: str
    other: Emoji | None = None
    unwanted: str = ""

    @property
    def prompt(self) -> str:
        return f"{self.emoji.name}, {self.background} background" if self.background else self.emoji.name

    @property
    def negative(self) -> str:
        named = (self.other.name if self.other else "", f"{self.unwanted} background" if self.unwanted else "")
        return ", ".join(filter(None, named))


class EmojiJudge:
    """Asks and judges. ``network`` names objects (an image-text model of emoji); without one they are not judged.

    ``style``: that of the model's emoji, whose colours count. Raises ConfigError for a style of unknown colours.
    """

    def __init__(self, network: Any | None = None, style: str = "", vocabulary: str = "everyday"):
        self.network, self.style = network, style or "twemoji"
        self.emojis = known_emojis(vocabulary, self.style)
        self.print = f"{VERSION} {self.style} {vocabulary}"

    def questions(self, count: int, seed: int, kind: str) -> list[EmojiQuestion]:
        """``count`` questions; the first of them are the same whatever ``count`` is. ``kind``: ``plain``,
        ``with_negatives`` or ``contradicting``.

        Each emoji comes once before one comes again, on a background that most of its colours differ from.
        """
        rng, order, found = random.Random(seed), list[Emoji](), list[EmojiQuestion]()
        for i in range(count):
            order = order or rng.sample(self.emojis, len(self.emojis))
            emoji = order.pop()
            background = rng.choice(self._backgrounds_of(emoji))
            other = rng.choice([e for e in self.emojis if e.code != emoji.code])
            unwanted = rng.choice([name for name in BACKGROUNDS if name != background])
            if kind == "plain":
                found.append(EmojiQuestion(emoji, background))
            elif kind == "contradicting":
                found.append(EmojiQuestion(emoji, background, other, unwanted))
            elif i % 2 == 0:
                found.append(EmojiQuestion(emoji, background, other))
            else:
                found.append(EmojiQuestion(emoji, "", None, UNWANTED))
        return found

    def _backgrounds_of(self, emoji: Emoji) -> list[str]:
        palette = main_colours(emoji.code, self.style)
        tellable = [
            name
            for name, tone in zip(BACKGROUNDS, background_tones(), strict=True)
            if palette.beside(tone, APART)[1] >= TELLABLE
        ]
        return tellable or list(BACKGROUNDS)

    def judge(self, pixels: Tensor, questions: Sequence[EmojiQuestion]) -> dict[str, Tensor]:
        """For pixels [B, 3, H, W] in -1..1: ``background``, ``object``, ``colour``, ``negative`` [B] each.

        1 where the picture is right in it (for ``negative``: shows nothing that the negative names), 0 where it is
        not, not a number where it was not asked or cannot be told.
        """
        shown = [shown_background(lab) for lab in pixels_to_lab(pixels)]
        right: dict[str, list[float]] = {"background": [], "colour": [], "negative": []}
        for lab, (name, share, tone), asked in zip(pixels_to_lab(pixels), shown, questions, strict=True):
            clear = share >= MOST
            right["background"].append(float(clear and name == asked.background) if asked.background else torch.nan)
            own = own_colour_share(lab, tone, main_colours(asked.emoji.code, self.style))
            right["colour"].append(own if own != own else float(own >= MOST))
            right["negative"].append(float(not (clear and name == asked.unwanted)) if asked.unwanted else torch.nan)
        found = {part: torch.tensor(values) for part, values in right.items()}
        found["object"] = torch.full((len(questions),), torch.nan)
        if self.network is not None:
            found["object"], absent = self._objects(pixels, questions, [name for name, *_ in shown])
            found["negative"] = torch.fmin(found["negative"], absent)  # of a number and none the number
        return found

    @torch.no_grad()
    def _objects(
        self, pixels: Tensor, questions: Sequence[EmojiQuestion], shown: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Whether the named object is among the names that fit best, and whether the unwanted one is not the best (not
        a number where none is unwanted)."""
        assert self.network is not None
        images = self.network.image_features(pixels).float().cpu()
        codes = [emoji.code for emoji in self.emojis]
        named, absent = [], []
        for image, asked, background in zip(images, questions, shown, strict=True):
            best = [codes[k] for k in (self._texts(background) @ image).topk(min(AMONG, len(codes))).indices.tolist()]
            named.append(float(asked.emoji.code in best))
            absent.append(float(asked.other.code != best[0]) if asked.other else torch.nan)
        return torch.tensor(named), torch.tensor(absent)

    @cache  # noqa: B019 - one judge a model under test
    def _texts(self, background: str) -> Tensor:
        """[N, D]: every emoji on this background."""
        assert self.network is not None
        texts = [EmojiQuestion(emoji, background).prompt for emoji in self.emojis]
        features: Tensor = self.network.text_features(texts)
        return features.float().cpu()
