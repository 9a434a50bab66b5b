"""``make demo``: the shipped model and adapter on a few prompts, beside the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..pictures.draw import complete, load, png_texts
from ..pictures.png import save_png
from ..pictures.recipe import Recipe
from .compare import Row, compare, picture

# (prompt, negative, seed counted from the recipe's); the last two differ in the negative alone.
PICTURES = (
    ("pizza, blue background", "", 0),
    ("hot beverage, yellow background", "", 1),
    ("owl, pink background", "", 2),
    ("smiling face with sunglasses, green background", "", 3),
    ("rocket, black background", "", 4),
    ("polar bear", "", 19),
    ("polar bear", "white background", 19),
)


@dataclass
class Demo:
    """What a demo run left behind."""

    rows: list[Row]
    grid: Path
    pictures: list[Path]
    device: str


def run(folder: Path, on_method: Callable[[str], None] | None = None, recipe: Recipe | None = None) -> Demo:
    """Write ``grid.png`` and one PNG a prompt into ``folder``, of the shipped model or of ``recipe``'s.

    Raises RecipeError, SunFileError, OSError.
    """
    recipe = recipe or Recipe()
    loaded = load(recipe)
    recipe = complete(recipe, loaded)
    prompts = [(prompt, negative) for prompt, negative, _ in PICTURES]
    offsets = [offset for _, _, offset in PICTURES]
    rows = compare(loaded, recipe, prompts, ["sun-4"], offsets=offsets, on_method=on_method)
    sheet = save_png(picture(rows, prompts), folder / "grid.png")
    pictures = []
    for image, (prompt, negative, offset) in zip(rows[1].images, PICTURES, strict=True):
        mine = replace(recipe, prompt=prompt, negative=negative, seed=recipe.seed + offset)
        name = "-".join("".join(c if c.isalnum() else " " for c in prompt).split())
        suffix = "-without-" + "-".join(negative.split()) if negative else ""
        pictures.append(save_png(image, folder / f"{name}{suffix}.png", png_texts(mine)[0]))
    return Demo(rows, sheet, pictures, recipe.device)
