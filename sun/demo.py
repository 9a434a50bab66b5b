"""``make demo``: the shipped model and adapter on a few prompts, beside the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from .compare import Row, compare, picture
from .generate import complete, load, png_texts
from .images import save_png
from .recipe import Recipe

# (prompt, negative); the last two pairs differ in the negative alone.
PROMPTS = (
    ("pizza, blue background", ""),
    ("hot beverage, yellow background", ""),
    ("owl, pink background", ""),
    ("smiling face with sunglasses, green background", ""),
    ("rocket, black background", ""),
    ("polar bear", ""),
    ("polar bear", "white background"),
)
NOISES = (0, 1, 2, 3, 4, 12, 12)  # seeds, counted from the recipe's; of the last two the same


@dataclass
class Demo:
    """What a demo run left behind."""

    rows: list[Row]
    grid: Path
    pictures: list[Path]
    device: str


def run(folder: Path, on_method: Callable[[str], None] | None = None) -> Demo:
    """Write ``grid.png`` and one PNG a prompt into ``folder``. Raises RecipeError, SunFileError, OSError."""
    recipe = Recipe()
    loaded = load(recipe)
    recipe = complete(recipe, loaded)
    rows = compare(loaded, recipe, PROMPTS, ["sun-4"], offsets=NOISES, on_method=on_method)
    sheet = save_png(picture(rows, PROMPTS), folder / "grid.png")
    pictures = []
    for image, (prompt, negative), offset in zip(rows[1].images, PROMPTS, NOISES, strict=True):
        mine = replace(recipe, prompt=prompt, negative=negative, seed=recipe.seed + offset)
        name = "-".join("".join(c if c.isalnum() else " " for c in prompt).split())
        suffix = "-without-" + "-".join(negative.split()) if negative else ""
        pictures.append(save_png(image, folder / f"{name}{suffix}.png", png_texts(mine)[0]))
    return Demo(rows, sheet, pictures, recipe.device)
