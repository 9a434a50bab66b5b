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
    ("large polar bear, yellow background", ""),
    ("ghost, orange background", "small"),
    ("small rocket, at the top, yellow background", ""),
    ("cat face next to fish, gray background", ""),
    ("soccer ball and dog face, pink background", ""),
    ("red apple", ""),
    ("red apple", "white background"),
)


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
    rows = compare(loaded, recipe, PROMPTS, ["sun-4"], on_method=on_method)
    sheet = save_png(picture(rows, PROMPTS), folder / "grid.png")
    pictures = []
    for i, (image, (prompt, negative)) in enumerate(zip(rows[1].images, PROMPTS, strict=True)):
        mine = replace(recipe, prompt=prompt, negative=negative, seed=recipe.seed + i)
        name = "-".join("".join(c if c.isalnum() else " " for c in prompt).split())
        suffix = "-without-" + "-".join(negative.split()) if negative else ""
        pictures.append(save_png(image, folder / f"{name}{suffix}.png", png_texts(mine)[0]))
    return Demo(rows, sheet, pictures, recipe.device)
