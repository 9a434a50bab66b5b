"""The other commands, errors in a sentence with the right exit code, and interruptions that leave nothing half made."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import make_adapter
from typer.main import get_command
from typer.testing import CliRunner, Result

import sun
from sun import SunAdapter
from sun.cli import app
from sun.cli.app import _ERRORS, _LAZY_ERRORS, SunGroup
from sun.common.atomic import write_atomically
from sun.common.settings import without_folders
from sun.files import SunInfo
from sun.ltc import LtcError
from sun.pictures.png import grid, read_png_text, save_png
from sun.pictures.recipe import read_recipe
from sun.shipped import EMOJI_CONTROLNET
from sun.training.config import SunTrainConfig

Run = Callable[..., Result]


def test_compare_draws_both_rows_and_counts_calls(tiny: Run, tmp_path: Path) -> None:
    target, figures = tmp_path / "c.png", tmp_path / "c.json"
    result = tiny(
        "compare", "a cat", "a dog", "--negative", "owl", "--also", "ddim-2", "--out", target, "--json", figures
    )
    content = json.loads(figures.read_text())
    calls = {method: row["unet_calls"] for method, row in content["methods"].items()}
    assert calls == {"dpmpp-25": 50, "sun-4": 4, "ddim-2": 4}
    assert content["reference"] == "dpmpp-25"
    assert all(row["seconds"] > 0 for row in content["methods"].values())
    assert content["methods"]["sun-4"]["paired_mse"] > 0
    assert "psnr" in content["methods"]["sun-4"]
    assert "dpmpp-25" in result.output
    width, height = Image.open(target).size
    assert width > 2 * 192
    assert height > 3 * 192


def test_compare_runs_in_half_precision(tiny: Run, tmp_path: Path) -> None:
    tiny("compare", "a cat", "--dtype", "bfloat16", "--out", tmp_path / "c.png", "--json", tmp_path / "c.json")
    row = json.loads((tmp_path / "c.json").read_text())["methods"]["sun-4"]
    assert 0 < row["paired_mse"] < 100


def test_sun_pictures_of_compare_are_those_of_generate(model_folder: Path, adapter_file: Path) -> None:
    from dataclasses import replace

    from sun.evaluation.compare import compare, psnr
    from sun.pictures.draw import complete, generate, load
    from sun.pictures.recipe import Recipe

    recipe = Recipe(seed=3, model=str(model_folder), adapter=str(adapter_file))
    loaded = load(recipe)
    recipe = complete(recipe, loaded)
    row = compare(loaded, recipe, [("a cat", "dog")], ["sun-4"])[1]
    drawn = generate(loaded, replace(recipe, prompt="a cat", negative="dog"))
    assert psnr(row.images[0], drawn.images[0]) > 50


def test_inspect_tells_all_of_an_adapter(sun: Run, adapter_file: Path, tmp_path: Path) -> None:
    result = sun("inspect", adapter_file, "--json", tmp_path / "i.json")
    report = json.loads((tmp_path / "i.json").read_text())
    assert report["kind"] == "SUN adapter"
    assert report["branches"] == "negative+positive"
    assert report["text_width"] == 16
    assert report["layout"] == "sun"
    assert report["parameters"] == sum(p.numel() for p in SunAdapter.load(adapter_file).parameters())
    assert len(report["layers"]) == 4
    assert report["sha256"] in result.output
    assert "down_blocks.0.attentions.0" in result.output


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("unet.down_blocks.0.attentions.0.to_k.lora_A.weight", "a LoRA"),
        ("lora_unet_down_blocks_0.alpha", "a LoRA"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a Stable Diffusion checkpoint"),
        ("decoder.up_blocks.0.resnets.0.conv1.weight", "a VAE"),
        ("down_blocks.0.resnets.0.conv1.weight", "a diffusers U-Net"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a text encoder"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
        ("lora_controlnet", "a Control-LoRA"),
        ("lora_unet_mid_block.hada_w1_a", "a LoHa"),
        ("lora_unet_mid_block.lokr_w2", "a LoKr"),
        ("base_model.model.mid_block.lora_A.weight", "a LoRA; use it"),
        ("unet.mid_block.attn1.processor.to_q_lora.down.weight", "a LoRA; use it"),
        ("lora_unet_mid_block.dora_scale", "a DoRA"),
        ("lora_unet_mid_block.oft_blocks", "an adapter of the kind OFT, which --lora does not take"),
        ("lora_unet_mid_block.on_input", "an adapter of the kind IA3, which --lora does not take"),
        ("lora_te2_text_model_encoder.lora_up.weight", "a LoRA for SDXL"),
        ("transformer.single_transformer_blocks.0.lora_A.weight", "a LoRA for a diffusion transformer"),
    ],
)
def test_inspect_tells_when_a_file_is_something_else(sun: Run, tmp_path: Path, key: str, kind: str) -> None:
    save_file({key: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    assert f"not a SUN adapter: {kind}" in sun("inspect", tmp_path / "x.safetensors").output


def test_inspect_of_a_model_folder(sun: Run, model_folder: Path) -> None:
    assert "StableDiffusionPipeline" in sun("inspect", model_folder).output


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\0\0\0\0\0\0\0{}      "])
def test_inspect_of_a_useless_file_is_an_error(sun: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    assert "error:" in sun("inspect", tmp_path / "x.safetensors", code=2).output


def test_convert_there_and_back_loses_nothing(sun: Run, adapter_file: Path, tmp_path: Path) -> None:
    official, back = tmp_path / "official.safetensors", tmp_path / "back.safetensors"
    sun("convert", adapter_file, official, "--layout", "official")
    sun("convert", official, back)
    before, after = SunAdapter.load(adapter_file).state_dict(), SunAdapter.load(back).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    sun("convert", adapter_file, tmp_path / "half.safetensors", "--dtype", "float16")
    assert all(p.dtype == torch.float16 for p in SunAdapter.load(tmp_path / "half.safetensors").parameters())


def test_convert_fixes_the_guidance_scale_of_an_adapter_that_takes_any(
    sun: Run, adapter_file: Path, tmp_path: Path
) -> None:
    made = SunAdapter([8] * 16, 16, info=SunInfo(guidance_scale=4.0), guided=True)
    made.save(tmp_path / "any.safetensors")
    sun("convert", tmp_path / "any.safetensors", tmp_path / "six.safetensors", "--guidance", "6")
    fixed = SunAdapter.load(tmp_path / "six.safetensors")
    assert (fixed.guided, fixed.info.guidance_scale) == (False, 6.0)
    refused = sun("convert", adapter_file, tmp_path / "seven.safetensors", "--guidance", "7", code=2)
    assert "fixed already" in refused.output
    shipped = sun("convert", "emoji", tmp_path / "shipped-at-2.safetensors", "--guidance", "2")
    assert "shipped-at-2" in shipped.output
    assert "guidance scale: 2" in sun("inspect", tmp_path / "shipped-at-2.safetensors").output
    assert "guidance scale: 1.5" in sun("inspect", "emoji").output
    sun("convert", adapter_file, tmp_path / "weaker.safetensors", "--strength", "0.5")
    factors = [
        {name: p for name, p in SunAdapter.load(file).named_parameters() if "alpha" in name}
        for file in (adapter_file, tmp_path / "weaker.safetensors")
    ]
    assert all(torch.equal(factors[1][name], factors[0][name] / 2) for name in factors[0])


def test_train_hands_file_options_and_settings_to_the_configuration(
    sun: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sun.training import sun as training

    seen: list[Any] = []
    monkeypatch.setattr(training, "train_sun", lambda config: seen.append(config) or tmp_path / "a.safetensors")
    (tmp_path / "c.toml").write_text('substeps = 3\nmodel = "from-file"\n[run]\nsteps = 7\nlr = 1e-3\n')
    sun("train", "--config", tmp_path / "c.toml", "--model", "m", "--lr", 0.5, "--no-resume", "--batch-size", 2,
        "--set", "run.seed=9", "--set", "stage_length=0.5", "--set", "betas=0.8,0.9")  # fmt: skip
    config = seen[0]
    assert (config.model, config.substeps, config.stage_length) == ("m", 3, 0.5)
    run = config.run
    assert (run.steps, run.lr, run.seed, run.resume, run.batch_size, run.betas) == (7, 0.5, 9, False, 2, (0.8, 0.9))


@pytest.mark.parametrize(
    ("command", "module", "function"), [("vae", "vae", "train_vae"), ("base", "base", "train_base")]
)
def test_train_emoji_runs_the_right_training(
    sun: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, module: str, function: str
) -> None:
    import importlib

    seen: list[Any] = []
    target = importlib.import_module(f"sun.lab.emoji.{module}")
    monkeypatch.setattr(target, function, lambda config: seen.append(config) or tmp_path)
    sun("train-emoji", command, "--steps", 3, "--set", "lr=0.1")
    assert (seen[0].run.steps, seen[0].run.lr) == (3, 0.1)


def test_evaluate_prints_and_writes_the_figures(sun: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sun import evaluation

    row = {"unet_calls": 4.0, "seconds": 0.1, "paired_mse": 0.05, "set_distance": 1.5, "kid": 0.01}
    made = {
        "reference": {"method": "dpmpp-25", "unet_calls": 50.0, "seconds": 1.0},
        "methods": {"sun-4": row},
        "floor": row,
        "negative_prompt": {"pairs": 2, "sun-4": {"cosine": 0.5}},
    }
    seen: list[Any] = []
    monkeypatch.setattr(evaluation, "evaluate", lambda config: seen.append(config) or made)
    result = sun("evaluate", "--prompts", 5, "--json", tmp_path / "e.json", "--set", "methods=sun-4,ddim-4")
    assert (seen[0].prompts, seen[0].methods) == (5, ("sun-4", "ddim-4"))
    assert json.loads((tmp_path / "e.json").read_text()) == made
    assert "sun-4" in result.output
    assert "+0.500" in result.output


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["generate"], "give a prompt"),
        (["generate", "a", "--size", "13"], "multiples of 8"),
        (["generate", "a", "--size", "big"], "not a size"),
        (["generate", "a", "--out", "x.jpg"], ".png"),
        (["compare", "a", "--out", "x.jpg"], ".png"),
        (["generate", "a", "--model", "missing"], "missing does not exist"),
        (["generate", "a", "--model", "."], "no model_index.json"),
        (["generate", "a", "--mask", "m.png"], "--init"),
        (["generate", "a", "--control", "c.png"], "belong together"),
        (["generate", "a", "--strength", "0.3"], "acts on --init alone"),
        (["generate", "a", "--denoise-mode", "respaced"], "acts on --init alone"),
        (["generate", "a", "--control-scale", "2"], "acts on --control alone"),
        (["generate", "a", "--share", "0.2"], "acts on --switch alone"),
        (["generate", "a", "--switch-order", "large first"], "acts on --switch alone"),
        (["generate", "a", "--adapter", "none", "--sun-strength", "0.5"], "there is no SUN"),
        (["generate", "a", "--init", "missing.png", "--strength", "0.1"], "leaves no step"),
        (["generate", "--from", "missing.png"], "missing.png does not exist"),
        (["generate", "a", "--steps", "0"], "--steps"),
        (["generate", "a", "--device", "abacus"], "abacus"),
        (["compare", "a", "--also", "magic-4"], "magic-4"),
        (["inspect", "missing.safetensors"], "missing.safetensors does not exist"),
        (["convert", "missing.safetensors", "b.safetensors"], "does not exist"),
        (["convert", "a.safetensors", "b.bin"], ".safetensors"),
        (["train", "--set", "stepz=3"], "steps"),
        (["train", "--set", "steps"], "key=value"),
        (["train", "--set", "steps=many"], "whole number"),
        (["train", "--set", "resume=perhaps"], "true or false"),
        (["train", "--set", "lr_schedule=cosin"], "constant, cosine"),
        (["train", "--set", "substeps=0"], "substeps is a number of at least 1"),
        (["train-peer", "guided-distill", "--set", "stage_length=2"], "stage_length is a share"),
        (["train-benchmark", "--set", "replace_probability=2"], "replace_probability is a probability"),
        (["train", "--config", "missing.toml"], "missing.toml cannot be read"),
        (["train", "--model", "missing"], "missing"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    sun: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = sun(*arguments, code=2)
    assert part in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("transformer.blocks.0.attn.to_q.lora_A.weight", "holds no LoRA for a Stable Diffusion 1.x U-Net"),
        ("lora_unet_nothing_of_it.lora_down.weight", "could not be loaded as a LoRA"),
        ("conv_in.weight", "could not be loaded as a LoRA"),
    ],
)
def test_a_lora_of_something_else_is_refused_in_a_sentence(tiny: Run, tmp_path: Path, key: str, part: str) -> None:
    lora = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(2, 2), key.replace("down", "up").replace("_A", "_B"): torch.zeros(2, 2)}, lora)
    output = tiny("generate", "a", "--lora", lora, "--out", tmp_path / "x.png", code=2).output
    assert f"{lora} {part}" in output
    assert "Unexpected" not in output


@pytest.mark.parametrize(("folder", "part"), [("unet", "lacks"), ("text_encoder", "could not be loaded")])
def test_a_controlnet_that_is_none_is_refused_in_a_sentence(
    tiny: Run, tmp_path: Path, model_folder: Path, photo: Path, folder: str, part: str
) -> None:
    given = ("--controlnet", model_folder / folder, "--control", photo)
    output = tiny("generate", "a", *given, "--out", tmp_path / "x.png", code=2).output
    assert str(model_folder / folder) in output
    assert part in output
    assert "Unexpected" not in output


def test_a_controlnet_of_one_file_is_a_control_lora(tiny: Run, tmp_path: Path, photo: Path) -> None:
    save_file({"conv_in.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    given = ("--controlnet", tmp_path / "x.safetensors", "--control", photo)
    output = tiny("generate", "a", *given, "--out", tmp_path / "x.png", code=2).output
    assert "could not be loaded as a Control-LoRA" in output
    assert "Unexpected" not in output


def test_a_png_without_a_recipe_is_an_error(sun: Run, photo: Path) -> None:
    assert "holds no SUN recipe" in sun("generate", "--from", photo, code=2).output
    save_png(Image.open(photo), photo, {"sun": "{broken"})
    assert "damaged" in sun("generate", "--from", photo, code=2).output


def test_debug_keeps_the_traceback(sun: Run) -> None:
    result = sun("--debug", "inspect", "missing.safetensors", code=1)
    assert "missing.safetensors" in str(result.exception)


def test_an_unexpected_error_is_told_with_exit_code_1(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sun.pictures import draw as engine

    def broken(*_: object) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(engine, "generate", broken)
    result = tiny("generate", "a", "--out", tmp_path / "x.png", code=1)
    assert "ZeroDivisionError: boom" in result.output
    assert "--debug" in result.output


def test_an_interrupted_run_exits_130_and_leaves_no_file(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import PngImagePlugin

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PngImagePlugin.PngInfo, "add_text", lambda *_: None)
    monkeypatch.setattr(Image.Image, "save", interrupted)
    result = tiny("generate", "a", "--seed", 1, "--out", tmp_path / "x.png", code=130)
    assert "stopped" in result.output
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("before")

    def fail(handle: Any) -> None:
        handle.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert path.read_text() == "before"


def test_png_text_survives_any_script(tmp_path: Path) -> None:
    text = {"a": "plain", "b": "猫 и café\nline two"}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "x.png", text)
    assert text.items() <= read_png_text(tmp_path / "x.png").items()


def test_a_grid_keeps_every_picture_whole() -> None:
    colours = ["red", "green", "blue", "yellow"]
    page = grid(
        [Image.new("RGB", (32, 32), c) for c in colours], 2, ["one", "two"], ["left", "right hand side"], scale=2
    )
    found = {colour: count for count, colour in page.getcolors(2**24)}
    for colour in ((255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 0)):
        assert found[colour] == 64 * 64


def leaf_commands() -> dict[str, Any]:
    """Every command by its words, sub-commands too."""
    found: dict[str, Any] = {}
    open_groups = [((), get_command(app))]
    while open_groups:
        words, group = open_groups.pop()
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                open_groups.append(((*words, name), command))
            else:
                found[" ".join((*words, name))] = command
    return found


@pytest.mark.parametrize("words", sorted(leaf_commands()))
def test_help_of_every_command_has_a_description_and_all_options(sun: Run, words: str) -> None:
    command = leaf_commands()[words]
    output = sun(*words.split(), "--help").output
    assert len(command.help) > 20
    assert " ".join(command.help.split())[:60] in " ".join(output.split())
    options = [option for option in command.params if option.param_type_name == "option" and not option.hidden]
    assert options
    for option in options:
        assert option.opts[0] in output
        assert option.help


def test_help_begins_with_the_commands_for_pictures_and_tells_the_exit_codes(sun: Run) -> None:
    output = sun("--help").output
    names = ("generate", "compare", "demo", "inspect", "convert", "evaluate", "train ")
    places = [output.index(f"│ {name}") for name in names]
    assert places == sorted(places)
    codes = "0 done, 1 unexpected error, 2 wrong input, 3 done but for some pictures of --prompts, 130 interrupted"
    assert codes in " ".join(output.replace("│", " ").split())


def test_help_shows_examples(sun: Run) -> None:
    for command in ("generate", "compare", "convert", "train", "evaluate"):
        assert f"sun {command}" in sun(command, "--help").output


def test_python_m_sun_and_the_version() -> None:
    root = Path(__file__).parents[2]
    for arguments, part in ((["--help"], "generate"), (["--version"], "sun 0.")):
        command = [sys.executable, "-m", "sun", *arguments]
        result = subprocess.run(
            command, cwd=root, env={**os.environ, "COLUMNS": "120"}, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr
        assert part in result.stdout


def test_help_does_not_wait_for_torch() -> None:
    program = "import sys, sun.cli; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'transformers')))"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True, timeout=120)


def test_demo_writes_pictures_and_prints_where(
    sun: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path, adapter_file: Path
) -> None:
    from sun.evaluation.compare import psnr
    from sun.pictures import draw as engine
    from sun.pipelines import loading

    monkeypatch.setattr(engine, "EMOJI_DIFFUSION", model_folder)
    monkeypatch.setattr(loading, "EMOJI_DIFFUSION", model_folder)
    monkeypatch.setattr("sun.shipped.EMOJI_SUN", adapter_file)
    monkeypatch.setattr(engine, "EMOJI_SUN", adapter_file)
    result = sun("demo", "--out", tmp_path / "demo", "--json", tmp_path / "d.json")
    assert "4 U-Net calls instead of 50" in result.output
    assert str(tmp_path / "demo" / "grid.png") in result.output
    pictures = sorted((tmp_path / "demo").glob("*.png"))
    assert len(pictures) == 1 + 7
    calls = {m: row["unet_calls"] for m, row in json.loads((tmp_path / "d.json").read_text())["methods"].items()}
    assert calls == {"dpmpp-25": 50, "sun-4": 4}
    one = next(p for p in pictures if "rocket" in p.name)
    shutil.copy(one, tmp_path / "one.png")
    sun("generate", "--from", tmp_path / "one.png", "--out", tmp_path / "again.png")
    assert psnr(Image.open(tmp_path / "one.png"), Image.open(tmp_path / "again.png")) > 50


def test_an_adapter_of_the_negative_branch_alone_is_inspected(
    sun: Run, tmp_path: Path, make_pipeline: Callable[..., Any]
) -> None:
    make_adapter(make_pipeline().unet, positive=False).save(tmp_path / "n.safetensors", layout="official")
    output = sun("inspect", tmp_path / "n.safetensors").output
    assert "branches: negative\n" in output
    assert "layout: official" in output


@pytest.mark.parametrize(
    ("name", "module", "kind"),
    [
        ("emoji-vae", "lab.emoji.vae", "VaeConfig"),
        ("emoji-recode", "lab.emoji.recoding", "RecodeConfig"),
        ("emoji-decoder", "lab.emoji.vae", "VaeConfig"),
        ("emoji-base", "lab.emoji.base", "BaseConfig"),
        ("emoji-sun", "training.sun", "SunTrainConfig"),
    ],
)
def test_the_settings_of_the_shipped_models_are_valid(name: str, module: str, kind: str) -> None:
    import importlib

    from sun.common.settings import apply, read_config

    path = Path(__file__).parents[2] / "configs" / f"{name}.toml"
    config = getattr(importlib.import_module(f"sun.{module}"), kind)()
    apply(config, read_config(path), path.name)
    assert (config.style if hasattr(config, "style") else config.data.split(":")[1]) == "twemoji"


def test_settings_that_travel_name_no_folders() -> None:
    config = SunTrainConfig(model="/home/me/models/sd15", data="C:\\pictures\\emoji", negatives="auto", init_adapter="")
    settings = without_folders(config)
    assert (settings["model"], settings["data"], settings["negatives"]) == ("sd15", "emoji", "auto")
    assert settings["data"] != config.data
    assert "output" not in settings["run"]


def test_a_wrong_key_in_a_file_names_the_file_and_the_nearest_setting(sun: Run, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[run]\nstepz = 3\n")
    output = sun("train", "--config", tmp_path / "c.toml", code=2).output
    assert "c.toml" in output
    assert "Did you mean steps" in output
    (tmp_path / "c.toml").write_text("run = 3\n")
    assert "group of settings" in sun("train", "--config", tmp_path / "c.toml", code=2).output
    (tmp_path / "c.toml").write_text("= 3\n")
    assert "not valid TOML" in sun("train", "--config", tmp_path / "c.toml", code=2).output


@pytest.mark.parametrize("seed", ["18446744073709551616", "-1", "1e3", "99999999999999999999999999", "nan"])
def test_seeds_that_torch_has_no_room_for_are_refused_before_a_run(tiny: Run, tmp_path: Path, seed: str) -> None:
    output = tiny("generate", "a", "--seed", seed, "--out", tmp_path / "x.png", code=2).output
    assert "--seed" in output
    assert "Unexpected" not in output


def test_the_last_seed_draws_and_a_batch_beyond_it_does_not(tiny: Run, tmp_path: Path) -> None:
    last = 2**64 - 1
    tiny("generate", "a", "--seed", last, "--out", tmp_path / "x.png")
    assert (
        "leaves no seeds"
        in tiny("generate", "a", "--seed", last, "--batch", 2, "--out", tmp_path / "y.png", code=2).output
    )
    assert "leaves no seeds" in tiny("compare", "a", "b", "--seed", last, "--out", tmp_path / "y.png", code=2).output


def test_a_target_that_cannot_be_written_costs_no_run(tiny: Run, sun: Run, tmp_path: Path, photo: Path) -> None:
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "b-1.png").mkdir()
    for target, given in (("dir.png", ()), ("b.png", ("--batch", 2)), (f"{photo.name}/x.png", ())):
        output = tiny("generate", "a", *given, "--out", tmp_path / target, code=2).output
        assert "--out" in output
        assert "U-Net calls" not in output
    assert "--out" in tiny("compare", "a", "--out", tmp_path / "dir.png", code=2).output
    assert "--json" in tiny("generate", "a", "--out", tmp_path / "x.png", "--json", tmp_path, code=2).output
    assert "--out" in sun("demo", "--out", photo, code=2).output
    assert "--out" in sun("calibrate", "--out", photo, code=2).output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b-1.png", "dir.png", "photo.png"]


def test_figures_go_to_standard_output_and_words_make_way(
    model_folder: Path, adapter_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(model_folder), "--adapter", str(adapter_file)]
    result = CliRunner().invoke(app, ["generate", "a", "--seed", "3", "--json", "-", "--out", "x.png", *model])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["seed"] == 3
    assert "U-Net calls" in result.stderr
    assert json.loads(CliRunner().invoke(app, ["inspect", str(adapter_file), "--json", "-"]).stdout)["layout"] == "sun"
    assert not (tmp_path / "-").exists()
    after = CliRunner().invoke(app, ["generate", "a", "--seed", "3", "--out", "x.png", *model])
    assert "U-Net calls" in after.stdout  # as ever without it


def test_a_prompt_comes_from_standard_input(model_folder: Path, adapter_file: Path, tmp_path: Path) -> None:
    model = [
        "--model",
        str(model_folder),
        "--adapter",
        str(adapter_file),
        "--seed",
        "1",
        "--out",
        str(tmp_path / "x.png"),
    ]
    assert CliRunner().invoke(app, ["generate", "-", *model], input="a red cat\n").exit_code == 0
    assert read_recipe(tmp_path / "x.png")[0].prompt == "a red cat"
    for nothing in ("", " \n"):
        result = CliRunner().invoke(app, ["generate", "-", *model], input=nothing)
        assert result.exit_code == 2
        assert "standard input" in result.output


@pytest.mark.parametrize("prompt", ["a <lora:ink:0.8>", "a (red:1.2) cat"])
def test_what_is_no_syntax_here_gets_a_note(tiny: Run, tmp_path: Path, prompt: str) -> None:
    for given in ((prompt,), ("a", "--negative", prompt)):
        output = tiny("generate", *given, "--seed", 1, "--out", tmp_path / "x.png").output
        assert output.count("note:") == 1
        assert "read as words" in output


def test_guidance_of_nothing_is_refused(tiny: Run, sun: Run, model_folder: Path, tmp_path: Path) -> None:
    plain = ("generate", "a", "--model", model_folder, "--adapter", "none", "--out", tmp_path / "x.png")
    for value in (0, 0.5):
        assert "guides nothing" in sun(*plain, "--guidance", value, code=2).output
    assert "guides nothing" in tiny("generate", "a", "--guidance", 0, "--out", tmp_path / "x.png", code=2).output
    assert "4 U-Net calls" in sun(*plain, "--guidance", 1).output


def test_words_beyond_the_first_75_tokens_steer_the_picture(tiny: Run, tmp_path: Path) -> None:
    long = " ".join("abcde" * 20)
    prompts = {"x": (long, "b"), "y": (f"{long} q", "b"), "z": (long, long), "w": (long, f"{long} q")}
    for name, (prompt, negative) in prompts.items():
        output = tiny("generate", prompt, "--negative", negative, "--seed", 1, "--out", tmp_path / f"{name}.png").output
        assert "note" not in output
    made = {name: (tmp_path / f"{name}.png").read_bytes() for name in prompts}
    assert len(set(made.values())) == 4
    output = tiny("generate", "a " * 2500, "--out", tmp_path / "v.png", code=2).output
    assert "2500 tokens" in output


@pytest.mark.parametrize("device", ["banana", "meta", "cuda:99", "", "CPU "])
def test_devices_that_are_not_there_are_refused(tiny: Run, sun: Run, tmp_path: Path, device: str) -> None:
    output = tiny("generate", "a", "--device", device, "--out", tmp_path / "x.png", code=2).output
    assert "not available" in output or "is none" in output
    if device:
        assert "not available" in sun("bench", "--device", device, "--emoji", code=2).output


def test_a_control_lora_of_another_size_is_refused_before_it_is_multiplied(
    sun: Run, tmp_path: Path, photo: Path
) -> None:
    """184 KB that would multiply to 2 GB."""
    content = load_file(EMOJI_CONTROLNET)
    up = next(name for name in content if name.endswith(".up"))
    for name, change in {
        "bomb": {up: torch.zeros(23000, 1), f"{up[:-3]}.down": torch.zeros(1, 23000)},
        "ranks": {up: torch.zeros(len(content[up]), 3)},
        "flat": {up: torch.zeros(23000)},
        "whole": {next(k for k in content if "zero_convs" in k and k.endswith("weight")): torch.zeros(2, 2, 1, 1)},
    }.items():
        file = tmp_path / f"{name}.safetensors"
        save_file({**content, **change}, file)
        given = ("generate", "a", "--controlnet", file, "--control", photo, "--out", tmp_path / "x.png")
        assert "another size" in sun(*given, code=2).output


def test_every_error_of_the_package_is_a_sentence_at_the_command_line() -> None:
    """Those of modules that need torch are known by name, which a new one is easily left out of."""
    handled_inside = {"CheckpointError", "ShardError", "RowError"}  # said as another one, or counted
    known = {kind.__name__ for kind in _ERRORS} | {*_LAZY_ERRORS} | handled_inside
    bases = {name: {ast.unparse(base) for base in node.bases} for name, node in _error_classes()}
    unknown = {name for name in bases if name not in known and not bases[name] & {*known}}
    assert not unknown
    assert len(bases) > 15


def test_a_narrower_error_is_a_sentence_too() -> None:
    class Narrow(LtcError):
        """As a later version may raise it."""

    narrow = typer.Typer(cls=SunGroup)

    @narrow.command()
    def fails() -> None:
        raise Narrow("this cannot be")

    @narrow.callback()
    def several() -> None:
        """Without it the only command would be the whole."""

    assert CliRunner().invoke(narrow, ["fails"]).exit_code == 2


def _error_classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for file in (Path(sun.__file__).parent).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                yield node.name, node
