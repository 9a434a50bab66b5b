"""``sun generate``: every kind of run, what it writes, and that a PNG makes its picture again."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_adapter, make_short_unet, make_unet
from typer.testing import Result

from sun.pictures.draw import changes_since, complete, generate, load, noise
from sun.pictures.recipe import Recipe, RecipeError, parameters, read_recipe, split_lora
from sun.surgery import bake, from_unet

Run = Callable[..., Result]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_a_picture_is_made_in_one_unet_call_a_step_and_counted(tiny: Run, tmp_path: Path) -> None:
    target, figures = tmp_path / "x.png", tmp_path / "x.json"
    result = tiny("generate", "a cat", "--negative", "a dog", "--seed", 3, "--out", target, "--json", figures)
    assert "4 U-Net calls" in result.output
    assert str(target) in result.output
    assert json.loads(figures.read_text())["unet_calls"] == 4
    assert Image.open(target).size == (64, 64)


def test_the_negative_prompt_and_the_strength_change_the_picture(tiny: Run, tmp_path: Path) -> None:
    made = []
    for i, extra in enumerate([[], ["--negative", "dog"], ["--sun-strength", 0.5], ["--sun-strength", 0]]):
        tiny("generate", "a cat", "--seed", 3, "--out", tmp_path / f"{i}.png", *extra)
        made.append(pixels(tmp_path / f"{i}.png"))
    assert all((made[i] != made[j]).any() for i in range(4) for j in range(i))


def test_a_png_makes_its_picture_again_bit_for_bit(tiny: Run, sun: Run, tmp_path: Path) -> None:
    first, again = tmp_path / "x.png", tmp_path / "y.png"
    tiny(
        "generate",
        "a cät, 猫",
        "--negative",
        "dog",
        "--seed",
        5,
        "--steps",
        3,
        "--scheduler",
        "dpmpp_2m",
        "--out",
        first,
    )
    result = sun("generate", "--from", first, "--out", again)
    assert "note" not in result.output
    assert (pixels(first) == pixels(again)).all()
    assert read_recipe(again)[0] == read_recipe(first)[0]


def test_each_picture_of_a_batch_can_be_made_again(tiny: Run, sun: Run, tmp_path: Path) -> None:
    tiny("generate", "a cat", "--seed", 5, "--batch", 3, "--out", tmp_path / "x.png")
    made = [pixels(tmp_path / f"x-{i}.png") for i in range(3)]
    assert (made[0] != made[1]).any()
    sun("generate", "--from", tmp_path / "x-2.png", "--out", tmp_path / "y.png")
    assert (pixels(tmp_path / "y.png") == made[2]).all()


def test_a_picture_of_a_batch_is_that_of_its_own_seed(tiny: Run, tmp_path: Path) -> None:
    tiny("generate", "a cat", "--seed", 5, "--batch", 3, "--out", tmp_path / "x.png")
    tiny("generate", "a cat", "--seed", 7, "--out", tmp_path / "y.png")
    difference = np.abs(pixels(tmp_path / "x-2.png").astype(int) - pixels(tmp_path / "y.png"))
    assert difference.max() <= 1


def test_options_beside_from_change_only_themselves(tiny: Run, sun: Run, tmp_path: Path) -> None:
    tiny("generate", "a cat", "--negative", "dog", "--seed", 5, "--batch", 2, "--out", tmp_path / "x.png")
    sun("generate", "--from", tmp_path / "x-1.png", "--steps", 2, "--out", tmp_path / "y.png")
    recipe = read_recipe(tmp_path / "y.png")[0]
    assert (recipe.steps, recipe.prompt, recipe.negative, recipe.seed, recipe.index) == (2, "a cat", "dog", 5, 1)
    sun("generate", "--from", tmp_path / "x-1.png", "--seed", 9, "--batch", 1, "--out", tmp_path / "z.png")
    assert read_recipe(tmp_path / "z.png")[0].seed == 9


def test_the_parameters_text_is_what_web_uis_read(tiny: Run, tmp_path: Path) -> None:
    tiny("generate", "a cat", "--negative", "dog", "--seed", 5, "--batch", 2, "--out", tmp_path / "x.png")
    lines = Image.open(tmp_path / "x-1.png").text["parameters"].splitlines()  # type: ignore[attr-defined]
    assert lines[:2] == ["a cat", "Negative prompt: dog"]
    settings = dict(pair.split(": ", 1) for pair in lines[2].split(", "))
    expected = {
        "Steps": "4",
        "Sampler": "Euler",
        "Schedule type": "Simple",
        "CFG scale": "1",
        "Seed": "6",
        "Size": "64x64",
    }
    assert expected.items() <= settings.items()
    assert settings["SUN adapter"] == "tiny"
    assert len(settings["SUN adapter hash"]) == 10


def test_loras_and_denoising_are_in_the_parameters() -> None:
    recipe = Recipe(
        prompt="x", loras=("a/ink.safetensors:0.5",), init="i.png", strength=0.25, adapter="none", guidance=5.0
    )
    text = parameters(recipe)
    assert "x <lora:ink:0.5>" in text
    assert "Denoising strength: 0.25" in text
    assert "CFG scale: 5" in text
    assert "SUN adapter" not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a:0.5", ("a", 0.5)),
        ("C:\\a", ("C:\\a", 1.0)),
        ("C:\\a:2", ("C:\\a", 2.0)),
    ],
)
def test_a_lora_is_a_path_with_an_optional_weight(text: str, expected: tuple[str, float]) -> None:
    assert split_lora(text) == expected


def test_noise_is_float32_from_the_seed_alone(model_folder: Path, adapter_file: Path) -> None:
    recipe = Recipe(seed=4, batch=2, model=str(model_folder), adapter=str(adapter_file))
    loaded = load(recipe)
    start = noise(complete(recipe, loaded), loaded)
    torch.manual_seed(5)
    assert torch.equal(start[1:], torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize(
    ("strength", "mode", "calls"),
    [(0.5, "trained", 2), (0.5, "respaced", 4), (1.0, "trained", 4), (0.29, "respaced", 4)],
)
def test_image_to_image_runs_the_steps_of_its_mode(
    tiny: Run, tmp_path: Path, photo: Path, strength: float, mode: str, calls: int
) -> None:
    target = tmp_path / "x.png"
    result = tiny(
        "generate",
        "a cat",
        "--init",
        photo,
        "--strength",
        strength,
        "--denoise-mode",
        mode,
        "--seed",
        1,
        "--out",
        target,
    )
    assert f"{calls} U-Net calls" in result.output
    assert read_recipe(target)[0].strength == strength


def test_image_to_image_visits_the_trained_timesteps(
    model_folder: Path, adapter_file: Path, photo: Path, count_calls: Callable[[Any], Any]
) -> None:
    recipe = Recipe(prompt="a", init=str(photo), strength=0.5, model=str(model_folder), adapter=str(adapter_file))
    loaded = load(recipe)
    log = count_calls(loaded.pipe.unet)
    generate(loaded, complete(recipe, loaded))
    assert log.timesteps == [499, 249]


def test_image_to_image_takes_the_pictures_size(tiny: Run, tmp_path: Path, photo: Path) -> None:
    Image.open(photo).resize((90, 50)).save(photo)
    tiny("generate", "a", "--init", photo, "--seed", 1, "--out", tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size == (88, 48)


def test_under_a_mask_the_rest_of_the_picture_stays_as_it_was(tiny: Run, tmp_path: Path, photo: Path) -> None:
    mask = tmp_path / "mask.png"
    Image.fromarray(np.pad(np.full((64, 32), 255, np.uint8), ((0, 0), (0, 32)))).save(mask)
    common = ("generate", "a", "--init", photo, "--mask", mask, "--seed", 1)
    tiny(*common, "--out", tmp_path / "x.png")
    tiny(*common, "--negative", "dog", "--out", tmp_path / "y.png")
    a, b, before = pixels(tmp_path / "x.png"), pixels(tmp_path / "y.png"), pixels(photo)
    assert (a[:, 32:] == before[:, 32:]).all()
    assert (a[:, :32] != before[:, :32]).mean() > 0.9
    assert (a[:, :32] != b[:, :32]).any()


@pytest.mark.parametrize("extra", [(), ("--init",), ("--init", "--mask")])
def test_a_controlnet_steers_text_image_and_mask_runs(
    tiny: Run, tmp_path: Path, photo: Path, controlnet_folder: Path, extra: tuple[str, ...]
) -> None:
    given = [part for name in extra for part in (name, photo)]
    for scale in (0.0, 1.0):
        tiny("generate", "a", *given, "--controlnet", controlnet_folder, "--control", photo, "--control-scale", scale,
             "--seed", 1, "--out", tmp_path / f"{scale}.png")  # fmt: skip
    assert (pixels(tmp_path / "0.0.png") != pixels(tmp_path / "1.0.png")).any()


def test_loras_are_applied_with_their_weights(
    tiny: Run, tmp_path: Path, make_short_pipeline: Callable[..., Any]
) -> None:
    lora = tmp_path / "lora.safetensors"
    _save_lora(make_short_pipeline(), lora)
    for weight in ("0", "1", "-1"):
        tiny("generate", "a", "--lora", f"{lora}:{weight}", "--seed", 1, "--out", tmp_path / f"{weight}.png")
    tiny("generate", "a", "--seed", 1, "--out", tmp_path / "plain.png")
    made = {name: pixels(tmp_path / f"{name}.png").astype(int) for name in ("0", "1", "-1", "plain")}
    assert np.abs(made["0"] - made["plain"]).max() <= 1
    assert (made["1"] != made["plain"]).any()
    assert (made["1"] != made["-1"]).any()


def _save_lora(pipe: Any, path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_q"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(
        path.parent, unet_lora_layers=get_peft_model_state_dict(pipe.unet), weight_name=path.name
    )


def test_without_an_adapter_guidance_costs_two_calls_a_step(sun: Run, tmp_path: Path, model_folder: Path) -> None:
    common = ("generate", "a", "--model", model_folder, "--adapter", "none", "--seed", 1, "--out", tmp_path / "x.png")
    assert "8 U-Net calls" in sun(*common, "--guidance", 5).output
    assert "4 U-Net calls" in sun(*common, "--guidance", 1).output


def test_without_a_word_on_guidance_a_model_is_drawn_at_its_own_scale(
    sun: Run, tmp_path: Path, model_folder: Path
) -> None:
    """The shipped model is right most often at 1.5, and pictures of it at Stable Diffusion's 7.5 are not."""
    for model, scale in ((model_folder, "7.5"), ("emoji", "1.5")):
        target = tmp_path / "x.png"
        sun("generate", "owl", "--model", model, "--adapter", "none", "--steps", 2, "--size", 64, "--out", target)
        with Image.open(target) as image:
            assert f"CFG scale: {scale}," in image.info["parameters"]


def test_an_adapter_that_takes_the_guidance_scale_gets_it(sun: Run, tmp_path: Path, model_folder: Path) -> None:
    made = from_unet(make_short_unet(), w=4.0, guided=True)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("_w"):
                parameter.fill_(0.3)
    adapter = tmp_path / "any.safetensors"
    made.save(adapter)

    def draw(name: str, *options: object) -> tuple[bytes, str]:
        target = tmp_path / f"{name}.png"
        sun("generate", "a", "--model", model_folder, "--adapter", adapter, "--seed", 1, "--out", target, *options)
        with Image.open(target) as image:
            return image.tobytes(), image.info["parameters"]

    own, text = draw("own")
    assert own == draw("four", "--guidance", 4)[0]
    assert "CFG scale: 4" in text
    six, text = draw("six", "--guidance", 6)
    assert six != own
    assert "CFG scale: 6" in text
    # The same as the adapter with 6 fixed in its weights.
    bake(made, 6.0).save(adapter)
    fixed = np.frombuffer(draw("fixed")[0], np.uint8).astype(int)
    assert np.abs(fixed - np.frombuffer(six, np.uint8)).max() <= 1
    refused = sun("generate", "a", "--model", model_folder, "--adapter", adapter, "--guidance", 6, code=2)
    assert "fixed at 6" in " ".join(refused.output.split())


def test_a_changed_or_missing_file_is_told(tiny: Run, sun: Run, tmp_path: Path, photo: Path) -> None:
    target = tmp_path / "x.png"
    tiny("generate", "a", "--init", photo, "--seed", 1, "--out", target)
    Image.new("RGB", (64, 64), "red").save(photo)
    result = sun("generate", "--from", target, "--out", tmp_path / "y.png")
    assert "has changed since" in result.output
    photo.unlink()
    assert "not there" in sun("generate", "--from", target, code=2).output


def test_a_file_named_relative_to_another_folder_can_be_named_anew(
    tiny: Run, sun: Run, tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    tiny("generate", "a", "--init", photo.name, "--seed", 1, "--out", "x.png")
    monkeypatch.chdir(elsewhere)
    refused = sun("generate", "--from", "../x.png", "--out", "y.png", code=2).output
    assert f"{photo.name} (init), which is not there. Put it back, or name it with --init." in refused
    result = sun("generate", "--from", "../x.png", "--init", photo, "--out", "y.png")
    assert "note" not in result.output
    assert (pixels(tmp_path / "x.png") == pixels(elsewhere / "y.png")).all()


@pytest.mark.parametrize(
    ("given", "option"),
    [({"model": "gone"}, "--model"), ({"loras": ("gone:0.5",)}, "--lora"), ({"controlnet": "gone"}, "--controlnet")],
)
def test_a_missing_file_is_told_with_the_option_that_names_it(given: dict[str, Any], option: str) -> None:
    with pytest.raises(RecipeError, match=rf"gone .* name it with {option}\."):
        changes_since(Recipe(**given), {})


def test_all_precisions_run(tiny: Run, tmp_path: Path) -> None:
    made = {}
    for dtype in ("float32", "bfloat16"):
        tiny("generate", "a cat", "--seed", 1, "--dtype", dtype, "--out", tmp_path / f"{dtype}.png")
        made[dtype] = pixels(tmp_path / f"{dtype}.png").astype(int)
    assert np.abs(made["float32"] - made["bfloat16"]).mean() < 8


def test_the_shipped_model_is_the_default(sun: Run, tmp_path: Path) -> None:
    target = tmp_path / "x.png"
    result = sun("generate", "large polar bear, yellow background", "--seed", 7, "--out", target)
    assert "4 U-Net calls" in result.output
    assert Image.open(target).size == (128, 128)
    sun("generate", "--from", target, "--out", tmp_path / "y.png")
    assert (pixels(target) == pixels(tmp_path / "y.png")).all()


def test_an_adapter_of_another_model_is_refused_in_a_sentence(sun: Run, tmp_path: Path, model_folder: Path) -> None:
    other = tmp_path / "other.safetensors"
    make_adapter(make_unet(text_width=24)).save(other)
    result = sun("generate", "a", "--model", model_folder, "--adapter", other, "--out", tmp_path / "x.png", code=2)
    assert "does not fit" in result.output
    assert "24" in result.output


def test_a_second_unet_makes_a_share_of_the_steps(
    sun: Run, full_depth_folder: Path, full_depth_adapter: Path, tmp_path: Path
) -> None:
    """The PNG makes its picture again; SUN is on both U-Nets; what does not fit gets a sentence."""
    from diffusers import UNet2DConditionModel

    config = dict(make_unet().config)
    torch.manual_seed(3)
    UNet2DConditionModel.from_config(config | {"layers_per_block": (1, 1, 1, 1)}).save_pretrained(tmp_path / "small")
    wide = config | {"block_out_channels": (8, 16, 24, 32)}
    UNet2DConditionModel.from_config(wide).save_pretrained(tmp_path / "other" / "unet")
    (tmp_path / "other" / "model_index.json").write_text("{}")
    model = ("--model", full_depth_folder, "--adapter", "none")
    plain = ("generate", "a cat", "--seed", 3, "--steps", 5, *model, "--scheduler", "dpmpp_2m")
    result = sun(*plain, "--switch", tmp_path / "small", "--share", 0.6, "--out", tmp_path / "x.png")
    assert "10 U-Net calls (6 of them of the small one)" in result.output
    sun("generate", "--from", tmp_path / "x.png", "--out", tmp_path / "y.png")
    assert (pixels(tmp_path / "x.png") == pixels(tmp_path / "y.png")).all()
    assert "Switching model: small, Switching share: 0.6" in Image.open(tmp_path / "x.png").text["parameters"]
    sun(*plain, "--out", tmp_path / "z.png")
    assert (pixels(tmp_path / "x.png") != pixels(tmp_path / "z.png")).any()

    both = (*plain, "--switch", tmp_path / "small", "--steps", 8, "--inherit", "fast")
    sun(*both, "--out", tmp_path / "i.png")
    result = sun(*both, "--ltc", "fast", "--out", tmp_path / "l.png")
    calls = [int(word) for word in re.findall(r"(\d+) U-Net calls \((\d+)", result.output)[0]]
    assert f"LTC-Accel: {calls[0] // 2} of 8 calls" in result.output  # of either U-Net, two rows of guidance a call
    assert 0 < calls[1] < calls[0] < 16

    with_sun = ("generate", "a cat", "--model", full_depth_folder, "--adapter", full_depth_adapter)
    result = sun(*with_sun, "--switch", tmp_path / "small", "--out", tmp_path / "s.png")
    assert "4 U-Net calls (2 of them of the small one)" in result.output  # SUN on both
    result = sun(*with_sun, "--switch", tmp_path / "other", "--out", tmp_path / "s.png", code=2)
    assert "--adapter none" in result.output
    result = sun(*with_sun, "--switch", tmp_path / "nowhere", "--out", tmp_path / "s.png", code=2)
    assert "nowhere" in result.output


def test_weights_in_prompts_are_read_by_a_library_and_kept_in_the_png(
    tiny: Run, sun: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compel")
    words, weighted, again = (tmp_path / f"{name}.png" for name in ("words", "weighted", "again"))
    given = ("generate", "a (red)1.5 cat", "--negative", "blue++", "--seed", 3, "--steps", 1)
    tiny(*given, "--out", words)
    tiny(*given, "--prompt-weights", "compel", "--out", weighted)
    assert (pixels(weighted) != pixels(words)).any()
    sun("generate", "--from", weighted, "--out", again)
    assert (pixels(again) == pixels(weighted)).all()

    (tmp_path / "many.csv").write_text("prompt,negative,seed\na (red)1.5 cat,blue++,3\n")
    tiny("generate", "--prompts", tmp_path / "many.csv", "--steps", 1, "--prompt-weights", "compel",
         "--out", tmp_path / "many")  # fmt: skip
    (made,) = (tmp_path / "many").rglob("*.png")
    assert (pixels(made) == pixels(weighted)).all()

    monkeypatch.setitem(sys.modules, "compel", None)
    result = sun("generate", "--from", weighted, "--out", again, code=2)
    assert "pip install compel" in " ".join(result.output.split())


def test_skipped_steps_are_counted_and_in_the_recipe(tiny: Run, sun: Run, model_folder: Path, tmp_path: Path) -> None:
    plain = ("generate", "a cat", "--seed", 3, "--steps", 20, "--model", model_folder, "--adapter", "none")
    plain = (*plain, "--scheduler", "dpmpp_2m", "--size", 32)
    sun(*plain, "--out", tmp_path / "plain.png")
    result = sun(*plain, "--ltc", "balanced", "--out", tmp_path / "x.png", "--json", tmp_path / "x.json")
    assert "26 U-Net calls" in result.output  # two rows of guidance each
    assert "LTC-Accel: 13 of 20 calls, 35 % saved." in result.output
    figures = json.loads((tmp_path / "x.json").read_text())
    assert (figures["unet_calls"], figures["ltc"]["calls"], figures["ltc"]["steps"]) == (26, 13, 20)
    assert (pixels(tmp_path / "x.png") != pixels(tmp_path / "plain.png")).any()
    again = sun("generate", "--from", tmp_path / "x.png", "--out", tmp_path / "y.png")
    assert "13 of 20 calls" in again.output
    assert (pixels(tmp_path / "y.png") == pixels(tmp_path / "x.png")).all()
    assert "LTC-Accel: balanced" in Image.open(tmp_path / "y.png").text["parameters"]  # type: ignore[attr-defined]
    (tmp_path / "rows.txt").write_text("a cat\n")
    sun("generate", "--prompts", tmp_path / "rows.txt", *plain[2:], "--ltc", "balanced", "--out", tmp_path / "many")
    (row,) = (tmp_path / "many").rglob("*.png")
    assert (pixels(row) == pixels(tmp_path / "x.png")).all()
    off = sun("generate", "--from", tmp_path / "x.png", "--ltc", "none", "--out", tmp_path / "z.png")
    assert "LTC-Accel" not in off.output
    assert (pixels(tmp_path / "z.png") == pixels(tmp_path / "plain.png")).all()


def test_inherited_features_are_in_the_recipe_and_go_with_skipped_steps(tiny: Run, sun: Run, tmp_path: Path) -> None:
    made = {}
    for name, extra in {"plain": (), "inherit": ("--inherit", "fast"),
                        "both": ("--inherit", "fast", "--ltc", "fast")}.items():  # fmt: skip
        made[name] = tmp_path / f"{name}.png"
        given = ("--seed", 3, "--steps", 8, "--size", 32, *extra, "--out", made[name])
        result = tiny("generate", "a cat", "--negative", "dog", *given)
        assert ("% saved" in result.output) == (name == "both")
    again = tmp_path / "again.png"
    for name in ("inherit", "both"):
        assert (pixels(made[name]) != pixels(made["plain"])).any()
        sun("generate", "--from", made[name], "--out", again)
        assert (pixels(again) == pixels(made[name])).all()
    assert "Feature inheritance: fast" in Image.open(again).text["parameters"]  # type: ignore[attr-defined]


def test_the_paper_s_setting_takes_a_table_and_only_one_of_the_same_run(
    sun: Run, model_folder: Path, tmp_path: Path
) -> None:
    model = ("--model", model_folder, "--adapter", "none", "--scheduler", "dpmpp_2m", "--size", 32, "--steps", 8)
    sun("calibrate", "a", "b", *model, "--tau", 0, "--out", tmp_path / "tables")
    (table,) = (tmp_path / "tables").glob("*.json")
    given = ("generate", "a cat", "--seed", 3, *model, "--ltc", "paper")
    result = sun(*given, "--ltc-table", table, "--out", tmp_path / "x.png")
    assert "LTC-Accel: 6 of 8 calls, 25 % saved." in result.output
    sun("generate", "--from", tmp_path / "x.png", "--out", tmp_path / "y.png")
    assert (pixels(tmp_path / "y.png") == pixels(tmp_path / "x.png")).all()
    sun("generate", "--from", tmp_path / "x.png", "--ltc", "fast", "--out", tmp_path / "z.png")
    assert read_recipe(tmp_path / "z.png")[0].ltc_table == ""

    out = ("--out", tmp_path / "no.png")
    assert "sun calibrate" in sun(*given, *out, code=2).output
    other = sun(*given, "--ltc-table", table, "--guidance", 3, *out, code=2)
    assert "measured with another guidance scale" in other.output
    assert "is for 8 steps, and 9 run" in sun(*given, "--ltc-table", table, "--steps", 9, *out, code=2).output
    wrong = sun(*given, "--ltc-table", table, "--scheduler", "unipc", *out, code=2)
    assert "does not know the sampler UniPC" in wrong.output
    content = table.read_text()
    table.write_text(content[:-20])
    assert table.name in sun(*given, "--ltc-table", table, *out, code=2).output
    table.unlink()
    gone = sun("generate", "--from", tmp_path / "x.png", *out, code=2)
    assert "--ltc-table" in gone.output
    assert not (tmp_path / "no.png").exists()


def test_a_run_on_a_start_picture_skips_of_the_steps_it_makes(tiny: Run, photo: Path, tmp_path: Path) -> None:
    given = ("generate", "a", "--init", photo, "--steps", 12, "--seed", 1, "--ltc", "fast", "--out", tmp_path / "x.png")
    assert "6 of 8 calls" in tiny(*given, "--strength", 0.667).output
    assert "skips none of 3 steps" in tiny(*given, "--strength", 0.25, code=2).output


def test_skipping_that_cannot_be_is_refused(tiny: Run, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "no.png")
    assert "--ltc balanced skips none of 4 steps. Take at least 5" in tiny(
        "generate", "a", "--ltc", "balanced", *out, code=2
    ).output  # fmt: skip
    assert "belongs to --ltc paper" in tiny("generate", "a", "--ltc-table", "x.json", *out, code=2).output
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "sun_export.json").write_text("{}")
    for option in ("ltc", "inherit"):
        with pytest.raises(RecipeError, match=f"--{option} fine: .* is an exported model"):
            complete(Recipe(model=str(tmp_path / "exported"), steps=20, **{option: "fine"}))


def test_the_names_of_accelerators_are_those_of_the_methods() -> None:
    from sun.cli.options import Inherit, Ltc
    from sun.inheritance import PRESETS
    from sun.ltc.presets import NAMES

    for field, options, names in (("ltc", Ltc, NAMES), ("inherit", Inherit, tuple(PRESETS))):
        assert tuple(options) == ("none", *names)
        for name in options:
            assert getattr(Recipe(**{field: name.value}), field) == name.value
        with pytest.raises(RecipeError, match="unknown"):
            Recipe(**{field: "quick"})
