"""Pictures with texts for the image-text model: scenes in every style, and which texts are true of which scenes.

A caption leaves things open, so it may be true of several pictures of a batch. ``Statement`` keeps what a text says,
``true_of`` decides, and the loss then neither rewards nor punishes such a pair.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from ...common.settings import ConfigError
from .scenes import (
    BACKGROUNDS,
    CATEGORY_WORDS,
    PLACE_PHRASES,
    PLACES,
    SIZES,
    Scene,
    random_scene,
    render_scene,
    write_caption,
)
from .sources import STYLES, Emoji, load_pictures


@dataclass(frozen=True)
class Statement:
    """A text and what it says of a scene; what is empty is left open."""

    text: str
    emojis: tuple[str, ...] = ()  # codes
    ordered: bool = False  # the first is on the left
    background: str = ""
    size: str = ""
    place: str = ""
    mirrored: bool = False
    category: str = ""

    def true_of(self, scene: Scene) -> bool:
        codes = tuple(e.code for e in scene.emojis)
        return (
            (self.emojis == codes if self.ordered else set(self.emojis) <= set(codes))
            and self.background in ("", scene.background)
            and self.size in ("", scene.size)
            and self.place in ("", scene.place)
            and (scene.mirrored or not self.mirrored)
            and (not self.category or self.category in (CATEGORY_WORDS.get(e.category) for e in scene.emojis))
        )


@dataclass(frozen=True)
class Pair:
    """A picture to be (``scene`` drawn in ``style``) and a text that is true of it."""

    style: str
    scene: Scene
    says: Statement


def caption(scene: Scene, rng: random.Random) -> Statement:
    """A caption as Emoji Diffusion is prompted with."""
    text = write_caption(scene.emojis, scene.background, scene.size, scene.place, scene.mirrored, rng)
    words = text.replace(",", " ").split()
    return Statement(
        text,
        tuple(e.code for e in scene.emojis),
        ordered=len(scene.emojis) == 2 and PLACE_PHRASES["right"] in text,
        background=scene.background if "background" in words else "",
        size=scene.size if scene.size in words else "",
        place=scene.place if scene.place and PLACE_PHRASES[scene.place] in text else "",
        mirrored=scene.mirrored and "mirrored" in words,
    )


def full_caption(scene: Scene) -> Statement:
    """A caption that leaves nothing open but the middle size and place, which have no words."""
    emojis, size = scene.emojis, f"{scene.size} " if scene.size else ""
    subject = size + emojis[0].name
    if len(emojis) == 2:
        subject = f"{emojis[0].name} on the left and {emojis[1].name} on the right"
    parts = [PLACE_PHRASES.get(scene.place, ""), "mirrored" if scene.mirrored else "", f"{scene.background} background"]
    return Statement(
        ", ".join(filter(None, (subject, *parts))),
        tuple(e.code for e in emojis),
        len(emojis) == 2,
        scene.background,
        scene.size,
        scene.place,
        scene.mirrored,
    )


def phrases(scene: Scene, rng: random.Random) -> Statement:
    """One to three phrases about the scene in any order, as negative prompts are written."""
    emoji = rng.choice(scene.emojis)
    background = rng.choice(("{} background", "on a {} background", "{}")).format(scene.background)
    kinds: dict[str, tuple[str, Any]] = {
        "emojis": (rng.choice((emoji.name, *emoji.aliases)), (emoji.code,)),
        "background": (background, scene.background),
        "size": (scene.size, scene.size),
        "place": (PLACE_PHRASES.get(scene.place, ""), scene.place),
        "mirrored": ("mirrored" if scene.mirrored else "", scene.mirrored),
        "category": (CATEGORY_WORDS.get(emoji.category, ""), CATEGORY_WORDS.get(emoji.category, "")),
    }
    known = [kind for kind, (text, _) in kinds.items() if text]
    said = rng.sample(known, rng.randint(1, min(3, len(known))))
    values = {kind: kinds[kind][1] for kind in said}
    return replace(Statement(", ".join(kinds[kind][0] for kind in said)), **values)


def combinations(scene: Scene) -> list[str]:
    """The (emoji, background, size) combinations of a scene."""
    size = "pair" if len(scene.emojis) == 2 else scene.size or "middle"
    return [f"{e.code}|{scene.background}|{size}" for e in scene.emojis]


class ScenePool:
    """Random scenes in several styles, with a fixed share of the (emoji, background, size) combinations held out."""

    def __init__(self, styles: tuple[str, ...], emojis: list[Emoji], held_out: float, picture_size: int = 128):
        if not styles or not set(styles) <= set(STYLES):
            raise ConfigError(f"styles: takes some of {', '.join(STYLES)}, not {', '.join(styles) or 'none'}.")
        self.held_out = held_out
        self.pictures: dict[str, dict[str, Image.Image]] = {}
        self.emojis: dict[str, list[Emoji]] = {}
        for style in styles:
            self.pictures[style] = load_pictures(style, emojis, picture_size)
            self.emojis[style] = [e for e in emojis if e.code in self.pictures[style]]

    def is_held_out(self, scene: Scene) -> bool:
        """Whether training never shows this scene: decided by its combinations alone, equal in all styles and runs."""
        return any(zlib.crc32(c.encode()) % 10_000 < 10_000 * self.held_out for c in combinations(scene))

    def scene(self, style: str, rng: random.Random, held_out: bool = False, attempts: int = 10_000) -> Scene:
        """A random scene that is held out, or one that is not. Raises ConfigError when there is none."""
        for _ in range(attempts):
            scene = random_scene(self.emojis[style], rng)
            if self.is_held_out(scene) == held_out:
                return scene
        raise ConfigError(f"held_out = {self.held_out} leaves no scenes {'to check with' if held_out else 'to train'}.")

    def variation(self, scene: Scene, style: str, rng: random.Random) -> Scene:
        """``scene`` with one or two things changed: what tells it from its original is in the caption's details."""
        for _ in range(100):
            changed = scene
            for _ in range(rng.randint(1, 2)):
                changed = self._change(changed, style, rng)
            if changed != scene and not self.is_held_out(changed):
                return changed
        return self.scene(style, rng)

    def _change(self, scene: Scene, style: str, rng: random.Random) -> Scene:
        pair = len(scene.emojis) == 2
        kind = rng.choice(("background", "emoji", "swap") if pair else ("background", "emoji", "size", "place", "flip"))
        if kind == "background":
            return replace(scene, background=rng.choice(list(BACKGROUNDS)))
        if kind == "swap":
            return replace(scene, emojis=scene.emojis[::-1])
        if kind == "emoji":
            other = rng.choice([e for e in self.emojis[style] if e not in scene.emojis] or list(scene.emojis))
            return replace(scene, emojis=(other, *scene.emojis[1:]))
        if kind == "size":
            size = rng.choice(list(SIZES))
            return replace(scene, size=size, place="" if size == "large" else scene.place)
        if kind == "place":
            return scene if scene.size == "large" else replace(scene, place=rng.choice(list(PLACES)))
        return replace(scene, mirrored=not scene.mirrored)

    def render(self, style: str, scene: Scene, size: int) -> Image.Image:
        """RGB picture of ``size`` x ``size`` pixels."""
        return render_scene(scene, self.pictures[style], size)

    def pairs(self, count: int, rng: random.Random, variations: float = 1.0, phrased: float = 0.2) -> list[Pair]:
        """``count`` training pairs.

        With probability ``variations`` a scene is followed by a variation of itself, in any style that has its emoji;
        with probability ``phrased`` a text is a list of phrases.
        """
        styles = list(self.pictures)
        drawn: list[tuple[str, Scene]] = []
        while len(drawn) < count:
            style = rng.choice(styles)
            scene = self.scene(style, rng)
            drawn.append((style, scene))
            if rng.random() < variations:
                varied = self.variation(scene, style, rng)
                able = [s for s in styles if all(e.code in self.pictures[s] for e in varied.emojis)]
                drawn.append((rng.choice(able), varied))
        return [
            Pair(style, scene, (phrases if rng.random() < phrased else caption)(scene, rng))
            for style, scene in drawn[:count]
        ]
