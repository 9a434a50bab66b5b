"""A recipe in somebody's PNG is read, or refused as RecipeError in a sentence; it reads and fills nothing.

`pytest -c tests/pytest.ini tests/pictures/test_recipes.py -rP` prints how many of each there were.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from sun.cli.app import app
from sun.pictures.draw import changes_since
from sun.pictures.recipe import FORMAT, MAX_PIXELS, Recipe, RecipeError, fingerprints, png_text, read_recipe

GOOD = asdict(Recipe(prompt="x", width=64, height=64, strength=0.5))
MUTATIONS = 1500


def png(path: Path, text: str | None = None, files: Any = None, made_with: Any = None, **changes: Any) -> Path:
    content = {"format": FORMAT, "recipe": {**GOOD, **changes}, "files": files or {}, "made_with": made_with or {}}
    info = PngImagePlugin.PngInfo()
    info.add_text("sun", json.dumps(content) if text is None else text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_a_recipe_survives_its_png(tmp_path: Path):
    recipe = Recipe(prompt="猫 👩‍🚀", negative="a, b", loras=("x.safetensors:0.5",), index=1, batch=2, guidance=3.0)
    info = PngImagePlugin.PngInfo()
    for key, value in png_text(recipe, 1, {"sun": "1"}, {"adapter": "ff"}).items():
        info.add_text(key, value)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    assert read_recipe(tmp_path / "x.png") == (recipe, {"files": {"adapter": "ff"}, "made_with": {"sun": "1"}})


@pytest.mark.parametrize(
    "change",
    [
        {"steps": "4"}, {"steps": 0}, {"steps": 1001}, {"steps": True}, {"steps": 4.0}, {"steps": None},
        {"width": 80_000, "height": 80_000}, {"width": 12}, {"width": -8}, {"batch": 10**9}, {"batch": 0},
        {"batch": 1024, "width": 512, "height": 512}, {"seed": -1}, {"seed": 2**64}, {"seed": 2**64 - 1, "batch": 2},
        {"seed": 1.5}, {"index": 1}, {"index": -1}, {"sun_strength": 99}, {"sun_strength": "1"}, {"guidance": 1e6},
        {"guidance": []}, {"strength": 1.01}, {"strength": -0.1}, {"control_scale": None}, {"prompt": 7},
        {"prompt": ["x"]}, {"prompt": "x" * 100_001}, {"prompt": "\0"}, {"prompt": "\ud800"}, {"model": None},
        {"model": "x" * 5000}, {"init": {}}, {"mask": 1}, {"loras": "x"}, {"loras": [1]}, {"loras": ["x"] * 65},
        {"loras": ["x:nan"]}, {"loras": ["x:inf"]}, {"scheduler": "lcm"}, {"scheduler": ["ddim"]},
        {"denoise_mode": "x"}, {"dtype": "int8"}, {"device": "meta"}, {"device": "cuda:1; rm"}, {"device": 0},
    ],
    ids=str,
)  # fmt: skip
def test_values_of_a_wrong_type_or_size_are_refused_by_name(tmp_path: Path, change: dict[str, Any]):
    with pytest.raises(RecipeError, match=r"x\.png: its SUN recipe is damaged: .*") as error:
        read_recipe(png(tmp_path / "x.png", **change))
    assert str(error.value).endswith("Get the original picture.")
    assert len(str(error.value)) < 400


def test_numbers_that_are_none_are_refused(tmp_path: Path):
    for value in ("NaN", "Infinity", "1e999", "9" * 5000, "-" + "9" * 400):
        text = json.dumps({"format": FORMAT, "recipe": GOOD, "files": {}, "made_with": {}})
        with pytest.raises(RecipeError, match="damaged"):
            read_recipe(png(tmp_path / "x.png", text.replace('"sun_strength": 1.0', f'"sun_strength": {value}')))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '"x"', "[" * 100_000, '{"a":' * 100_000, '{"format": "sun-picture-1"}',
     '{"format": "sun-picture-1", "recipe": []}', '{"format": "sun-picture-1", "recipe": {}, "files": []}',
     '{"format": "sun-picture-1", "recipe": {}, "files": {"a": 1}}', '{"format": {"a": 1}, "recipe": {}}',
     '{"format": "sun-picture-1", "recipe": {}, "files": {}, "made_with": "x"}'],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_chunks_that_are_no_recipe_are_refused(tmp_path: Path, text: str):
    with pytest.raises(RecipeError, match=r"x\.png"):
        read_recipe(png(tmp_path / "x.png", text))


def test_a_recipe_of_another_format_says_so_without_control_characters(tmp_path: Path):
    with pytest.raises(RecipeError, match="Update SUN") as error:
        read_recipe(png(tmp_path / "x.png", json.dumps({"format": "\x1b[2Jsun-picture-9", "recipe": {}})))
    assert str(error.value).isprintable()


def mutations(rng: random.Random) -> Callable[[Any], Any]:
    odd = [None, True, False, 0, -1, 4, 2**31, 2**63, 2**64, 10**30, 0.0, -1.5, 1e300, "", "x", "\0", "\x1b[2J", "4",
           "nan", "../..", "/dev/zero", "/usr", [], [[]], [1], ["x"], {}, {"a": []}, "x" * 10_000]  # fmt: skip

    def deep(levels: int) -> Any:
        value: Any = []
        for _ in range(levels):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value

    def change(content: Any) -> Any:
        place = rng.choice(["recipe", "recipe", "recipe", "top", "files", "made_with", "drop", "add"])
        value = deep(rng.choice([3, 70, 900])) if rng.random() < 0.05 else copy.deepcopy(rng.choice(odd))
        if place == "top":
            content[rng.choice(list(content) or ["x"])] = value
        elif place == "drop":
            content.pop(rng.choice(list(content) or ["x"]), None)
        elif isinstance(inner := content.get("recipe" if place == "add" else place), dict):
            inner[rng.choice([f.name for f in fields(Recipe)] if place == "recipe" else ["adapter", "init", "z"])] = (
                value
            )
        return content

    return change


def test_mutated_recipes_are_read_or_refused_as_recipe_errors(tmp_path: Path):
    rng, counts, sentences = random.Random(7), Counter[str](), set[str]()
    for number in range(MUTATIONS):
        content = {"format": FORMAT, "recipe": dict(GOOD), "files": {"adapter": "ff"}, "made_with": {"sun": "0"}}
        change = mutations(rng)
        for _ in range(rng.choice([1, 1, 2, 4])):
            content = change(content)
        text = json.dumps(content)
        if number % 5 == 0:  # and damaged bytes of it
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(["", "\\", "{", '"', "NaN", "\x00", "9" * 5000]) + text[at + 1 :]
        try:
            recipe, rest = read_recipe(png(tmp_path / "x.png", text))
            assert recipe.batch * recipe.width * recipe.height <= MAX_PIXELS
            assert set(rest) == {"files", "made_with"}
            counts["read"] += 1
            changes_since(recipe, rest)
            counts["and all its files are there"] += 1
        except RecipeError as error:
            counts["refused"] += 1
            sentences.add(str(error))
    print(MUTATIONS, "mutated recipes:", dict(counts))
    assert counts["read"] > 50
    assert counts["refused"] > 500
    assert all(sentence.isprintable() and len(sentence) < 1000 for sentence in sentences)


@pytest.mark.parametrize("field", ["adapter", "init", "mask", "control", "model", "controlnet", "lora 0"])
def test_files_that_are_none_are_not_read(tmp_path: Path, field: str):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in ("/dev/zero", "/dev/urandom", "/usr", "/proc", str(tmp_path / "pipe"), str(tmp_path / "folder")):
        with pytest.raises(RecipeError, match=r"regular file|is a folder"):
            fingerprints({field: path})
    for path in (str(tmp_path / "none"), "x" * 5000, "a\0b"):
        with pytest.raises(RecipeError):
            fingerprints({field: path})


def test_files_are_checked_before_the_libraries_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sun.cli.pictures._engine", lambda: pytest.fail("it loads"))
    monkeypatch.setattr("sun.pictures.recipe.fingerprint", lambda _: pytest.fail("it is read"))
    for change in ({"adapter": "/dev/zero"}, {"model": "/usr"}, {"init": str(tmp_path)}, {"mask": "none.png"}):
        picture = png(tmp_path / "x.png", files={"adapter": "x"}, **change)
        done = CliRunner().invoke(app, ["generate", "--from", str(picture), "--out", str(tmp_path / "y.png")])
        assert done.exit_code == 2, done.output


@pytest.mark.parametrize(
    "named", ["//host/x.png", "\\\\host\\x.png", "/\\host\\x.png", "\\/host/x.png", "https://host/x.png"]
)
def test_files_on_other_machines_are_not_asked_for(tmp_path: Path, named: str):
    for change in ({"init": named}, {"model": named}, {"config": named}, {"loras": [f"{named}:1"]}):
        with pytest.raises(RecipeError, match="another machine"):
            read_recipe(png(tmp_path / "x.png", **change))


def test_the_command_refuses_hostile_recipes_at_once(tmp_path: Path):
    for change in ({"adapter": "/dev/zero"}, {"model": "/usr"}, {"width": 80_000, "height": 80_000}, {"batch": 10**9},
                   {"steps": "4"}, {"prompt": "\x1b[2J", "steps": 0}):  # fmt: skip
        picture = png(tmp_path / "x.png", files={"adapter": "x", "model": "x"}, **change)
        done = CliRunner().invoke(app, ["generate", "--from", str(picture), "--out", str(tmp_path / "y.png")])
        assert done.exit_code == 2, done.output
        assert "Unexpected" not in done.output
        assert "\x1b" not in done.output
    assert not (tmp_path / "y.png").exists()
