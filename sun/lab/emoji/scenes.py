"""Random emoji scenes with captions: what Emoji Diffusion is trained on.

A scene is one or two emoji on a plain background. Its caption names the emoji and a random part of the
attributes that the renderer chose, so that prompts compose and a negative prompt has something to remove.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

from PIL import Image

from .sources import Emoji, load_metadata

BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (16, 16, 18),
    "gray": (140, 144, 150),
    "red": (214, 48, 49),
    "orange": (243, 146, 55),
    "yellow": (250, 220, 90),
    "green": (86, 176, 80),
    "cyan": (110, 206, 218),
    "blue": (52, 104, 205),
    "purple": (138, 74, 178),
    "pink": (247, 168, 196),
    "brown": (124, 84, 58),
}
SIZES = {"small": 0.48, "": 0.72, "large": 0.94}
PLACES = {"": (0.5, 0.5), "left": (0.0, 0.5), "right": (1.0, 0.5), "top": (0.5, 0.0), "bottom": (0.5, 1.0)}

PLACE_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
CATEGORY_WORDS = {
    "Smileys & Emotion": "smiley",
    "People & Body": "person",
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activity",
    "Objects": "object",
    "Symbols": "symbol",
}

_TONE = rf"(?:{'|'.join(BACKGROUNDS)})"
_NAMES_A_BACKGROUND = re.compile(rf"(?:on an? )?{_TONE} background")
_NAMES_A_TONE = re.compile(rf"(?:on an? )?{_TONE}(?: background)?")


@dataclass(frozen=True)
class Scene:
    """What is in a picture; ``caption`` says a random part of it."""

    emojis: tuple[Emoji, ...]
    background: str
    size: str
    place: str
    mirrored: bool
    caption: str


def random_scene(emojis: list[Emoji], rng: random.Random, pair_probability: float = 0.2) -> Scene:
    """Draw a scene and write its caption."""
    background = "white" if rng.random() < 0.25 else rng.choice(list(BACKGROUNDS))
    pair = rng.random() < pair_probability
    chosen = tuple(rng.sample(emojis, 2 if pair else 1))
    size = "" if pair else rng.choices(list(SIZES), (0.2, 0.55, 0.25))[0]
    place = "" if pair or size == "large" else rng.choices(list(PLACES), (0.6, 0.1, 0.1, 0.1, 0.1))[0]
    mirrored = not pair and rng.random() < 0.15
    return Scene(
        chosen, background, size, place, mirrored, write_caption(chosen, background, size, place, mirrored, rng)
    )


def random_captions(count: int, rng: random.Random) -> list[str]:
    """Prompts of random scenes of the everyday emoji."""
    emojis = load_metadata()
    return [random_scene(emojis, rng).caption for _ in range(count)]


def consistent_negative(negative: str, prompt: str) -> str:
    """The negative without its colours of a background, where the prompt names the background itself.

    Guidance goes from what the negative names through what the prompt names and on: purple away from orange is light
    blue. Nobody who wants purple says so, and the picture would be called wrong for doing as it was told.
    """
    if not any(_NAMES_A_BACKGROUND.fullmatch(part.strip()) for part in prompt.split(",")):
        return negative
    parts = (part.strip() for part in negative.split(","))
    return ", ".join(part for part in parts if not _NAMES_A_TONE.fullmatch(part))


def write_caption(
    emojis: tuple[Emoji, ...], background: str, size: str, place: str, mirrored: bool, rng: random.Random
) -> str:
    """One sentence about the scene. Each attribute is left out now and then, the emoji never."""
    names = [rng.choice((e.name, *e.aliases)) if rng.random() < 0.5 else e.name for e in emojis]
    said_size = size if size and rng.random() < 0.9 else ""
    subject = " ".join(filter(None, (said_size, names[0])))
    if len(emojis) == 2:
        subject = rng.choice(
            (
                f"{names[0]} and {names[1]}",
                f"{names[0]} on the left and {names[1]} on the right",
                f"{names[0]} next to {names[1]}",
            )
        )
    else:
        subject = rng.choice(("{}", "a {}", "{} emoji")).format(subject)
    parts = []
    if place and rng.random() < 0.9:
        parts.append(PLACE_PHRASES[place])
    if mirrored and rng.random() < 0.9:
        parts.append("mirrored")
    if len(emojis) == 1 and rng.random() < 0.15:
        parts.append(CATEGORY_WORDS.get(emojis[0].category, "emoji"))
    if rng.random() < (0.6 if background == "white" else 0.85):
        wording = rng.choice(("{} background", "on a {} background", "{} background"))
        parts.append(wording.format(background))
    rng.shuffle(parts)
    return ", ".join([subject, *parts])


def caption_of(scene: Scene, rng: random.Random) -> str:
    """Another caption of the same scene."""
    return write_caption(scene.emojis, scene.background, scene.size, scene.place, scene.mirrored, rng)


def render_scene(scene: Scene, pictures: dict[str, Image.Image], size: int) -> Image.Image:
    """RGB picture of ``size`` x ``size`` pixels."""
    canvas = Image.new("RGB", (size, size), BACKGROUNDS[scene.background])
    for picture, box in _placed(scene, pictures, size):
        canvas.paste(picture, box, picture)
    return canvas


def posed(picture: Image.Image, scene: Scene, rng: random.Random) -> Image.Image:
    """A scene's picture turned by up to 40 degrees, stretched and moved at random, on its background.

    No caption tells of it, so only an edge ControlNet can draw it.
    """
    angle = math.radians(rng.uniform(-40, 40))
    stretch, zoom = math.exp(rng.uniform(-0.35, 0.35)), math.exp(rng.uniform(-0.1, 0.4))
    across, down = zoom * stretch, zoom / stretch
    cos, sin = math.cos(angle), math.sin(angle)
    a, b, d, e = across * cos, across * sin, -down * sin, down * cos
    middle = picture.width / 2
    x, y = (middle * (1 + rng.uniform(-0.2, 0.2)) for _ in range(2))
    return picture.transform(
        picture.size,
        Image.Transform.AFFINE,
        (a, b, middle - a * x - b * y, d, e, middle - d * x - e * y),
        Image.Resampling.BICUBIC,
        fillcolor=BACKGROUNDS[scene.background],
    )


def subject_mask(scene: Scene, pictures: dict[str, Image.Image], size: int, which: int = 0) -> Image.Image:
    """Where emoji number ``which`` of the scene is: white on black, mode L, ``size`` x ``size`` pixels."""
    canvas = Image.new("L", (size, size))
    picture, box = _placed(scene, pictures, size)[which]
    canvas.paste(255, box, picture)
    return canvas.point(lambda value: 255 if value >= 128 else 0)


def _placed(scene: Scene, pictures: dict[str, Image.Image], size: int) -> list[tuple[Image.Image, tuple[int, int]]]:
    """The RGBA pictures of the scene's emoji at their size, and where their upper left corners go."""
    if len(scene.emojis) == 2:
        side = round(size * 0.48)
        boxes = [(round(size * 0.01), (size - side) // 2), (round(size * 0.51), (size - side) // 2)]
    else:
        side = round(size * SIZES[scene.size])
        x, y = PLACES[scene.place]
        margin = size * 0.03
        boxes = [(round(margin + x * (size - side - 2 * margin)), round(margin + y * (size - side - 2 * margin)))]
    placed = []
    for emoji, box in zip(scene.emojis, boxes, strict=True):
        picture = pictures[emoji.code].resize(
            (side, side), Image.Resampling.BOX if side * 2 < size else Image.Resampling.LANCZOS
        )
        if scene.mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        placed.append((picture, box))
    return placed
