"""``sun reproduce``: the whole chain with tiny numbers, resumed, skipped and made anew where it has to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sun.common.settings import ConfigError, apply, read_config
from sun.lab import reproduce as runner
from sun.lab.emoji import main_colours
from sun.lab.reproduce import Marks, reproduce, time_left
from sun.lab.stages import TRAINERS, Recipe, ReproduceConfig, Stage, quick, stages_of
from sun.shipped import EMOJI_DIFFUSION, MODELS_DIR

CONFIG = Path(__file__).parents[2] / "configs" / "reproduce.toml"


def test_the_real_numbers_are_settings_of_their_trainers(tmp_path: Path) -> None:
    recipe = Recipe(apply(ReproduceConfig(), read_config(CONFIG)))
    more: dict[str, dict[str, Any]] = {"sun": {"guidance_scale": 4.0}, "sun-guided": {"guidance_range": (1.0, 8.0)}}
    calls = {}
    for name in TRAINERS:
        run = recipe.trainer(name, True, **more.get(name, {})).run
        calls[name] = run.unet_calls
        assert bool(run.minutes) != bool(run.unet_calls), f"{name} ends by one budget"
    assert calls["lcm-lora"] == calls["guided-distill"] == calls["sun"] + calls["sun-guided"] == 200_000
    assert 3 * 60 < sum(stage.minutes for stage in stages_of(recipe)) < 7 * 60
    short = Recipe(apply(ReproduceConfig(minutes=10), read_config(CONFIG)))
    assert sum(stage.minutes for stage in stages_of(short) if short.minutes_of(stage.name.partition(":")[0])) < 10.1


def test_all_of_it_for_a_base_that_is_there(tmp_path: Path) -> None:
    settings = {**read_config(CONFIG), "base": "emoji", "output": str(tmp_path), "minutes": 10}
    recipe = Recipe(apply(ReproduceConfig(), settings))
    stages = stages_of(recipe)
    assert not {stage.name for stage in stages} & {"autoencoder", "recode", "decoder", "colours", "base"}
    assert stages[0].name == "contrast"
    assert recipe.trainer("controlnet", True, model=str(recipe.base)).model == str(EMOJI_DIFFUSION)
    timed = [stage.minutes for stage in stages if recipe.minutes_of(stage.name.partition(":")[0])]
    assert sum(timed) == pytest.approx(10)
    assert all("base" in recipe.settings_of(stage.name) for stage in stages), "another base makes all of it anew"
    with pytest.raises(ConfigError, match="no model"):
        Recipe(ReproduceConfig(output=str(tmp_path), base=str(tmp_path / "none")))


def test_unknown_stages_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"autoencoder, recode.*not autoencodr"):
        Recipe(ReproduceConfig(stages={"autoencodr": {}}))
    with pytest.raises(ConfigError, match="setting output"):
        reproduce(ReproduceConfig(output=""))
    with pytest.raises(ConfigError, match="is not shipped"):
        reproduce(ReproduceConfig(output=str(tmp_path)), tiny=True, ship=True)
    with pytest.raises(ConfigError, match="stage agreement chooses"):
        _ = Recipe(ReproduceConfig(output=str(tmp_path))).guidance


def test_the_scale_that_ships_guides_and_has_the_best_agreement(tmp_path: Path) -> None:
    rows = {scale: {"agreement": share} for scale, share in (("1", 0.95), ("2", 0.8), ("3", 0.9), ("8", 0.9))}
    (tmp_path / "agreement").mkdir()
    figures = {"models": {"base": {"agreement_by_guidance": {"rows": rows, "best": 1.0}}}}
    (tmp_path / "agreement" / "figures.json").write_text(json.dumps(figures))
    assert Recipe(ReproduceConfig(output=str(tmp_path))).guidance == 3


def test_a_stage_is_skipped_resumed_or_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, bool]] = []
    broken = {"second": True}

    def stage(name: str) -> Stage:
        result = tmp_path / name

        def make(resume: bool) -> None:
            made.append((name, resume))
            if broken.pop(name, False):
                raise KeyboardInterrupt
            result.touch()

        return Stage(name, name, 1.0, (result,), make)

    monkeypatch.setattr(runner, "stages_of", lambda recipe: [stage(name) for name in ("first", "second", "third")])
    changing = {"second": "unet_calls"}
    monkeypatch.setattr(Recipe, "settings_of", lambda r, name: [getattr(r.config, changing.get(name, "styles"))])
    said: list[str] = []
    config = ReproduceConfig(output=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        reproduce(config, say=said.append)
    assert reproduce(config, say=said.append) == tmp_path
    assert made == [("first", True), ("second", True), ("second", True), ("third", True)]
    assert any("first: there, made in" in line for line in said)
    made.clear()
    reproduce(config, say=said.append)
    assert made == []
    reproduce(ReproduceConfig(output=str(tmp_path), unet_calls=7), say=said.append)
    assert made == [("second", False), ("third", False)], "what comes after a stage made anew is made anew"
    made.clear()
    (tmp_path / "third").unlink()
    reproduce(ReproduceConfig(output=str(tmp_path), unet_calls=7), say=said.append)
    assert [name for name, _ in made] == ["third"]
    (tmp_path / "stages" / "first.json").write_text("{")
    assert Marks(tmp_path).read("first") is None


def test_time_left_is_told_in_minutes_or_hours() -> None:
    assert time_left([10.0, 20.0, 30.0], 1) == "about 50 min left"
    assert time_left([10.0, 200.0, 100.0], 1) == "about 5.0 h left"


@pytest.mark.slow
def test_the_chain_runs_end_to_end(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_reference: str
) -> None:
    table = main_colours.write_table(tmp_path / "colours.json", ("twemoji", "openmoji", "google"))
    monkeypatch.setattr(main_colours, "TABLE_FILE", table)
    shipped = {file: file.stat().st_mtime_ns for file in MODELS_DIR.rglob("*") if file.is_file()}
    config = ReproduceConfig(output=str(tmp_path / "out"))
    said: list[str] = []
    folder = reproduce(config, tiny=True, say=said.append)
    assert {file: file.stat().st_mtime_ns for file in MODELS_DIR.rglob("*") if file.is_file()} == shipped
    released = folder / "release"
    models = released / "sun" / "models"
    files = ("emoji-diffusion/unet/config.json", "emoji-sun.safetensors", "emoji-sun.md")
    folders = ("emoji-contrast", "emoji-controlnet", "emoji-inpainting", "emoji-lora")
    for file in (*files, *(f"{folder}/README.md" for folder in folders)):
        assert (models / file).is_file(), file
    card = (models / "emoji-diffusion" / "README.md").read_text()
    assert "## Colours" in card
    assert "| w | right in all |" in card
    assert Image.open(models / "emoji-diffusion" / "agreement-vs-guidance.png").width > 100
    assert Image.open(released / "docs" / "demo.png").width > 100
    figures = json.loads((released / "reports" / "emoji" / "figures.json").read_text())
    assert set(figures["models"]) == {"base", "openmoji", "lora-google"}
    methods = figures["models"]["base"]["methods"]
    assert set(methods) == {"sun-2", "ddim-2", "lcm-lora-2", "guided-distill-2"}
    for row in methods.values():
        assert {"unet_calls", "seconds", "set_distance", "paired_mse", "median_mse", "psnr", "agreement"} <= set(row)
    count = len(stages_of(Recipe(quick(config))))
    assert [line.split("]")[0] for line in said] == [f"[{n}/{count}" for n in range(1, count + 1)]
    said.clear()
    reproduce(config, tiny=True, say=said.append)
    assert all(": there, made in" in line for line in said), said
