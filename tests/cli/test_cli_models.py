"""Model files that are not whole, or not what they look like: refused by every command, in words, and never drawn."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from ldm import make_vae, save_single_file
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import Result

from sun.common.settings import ConfigError
from sun.evaluation.config import EvaluateConfig
from sun.evaluation.loading import load_sampler
from sun.pictures.draw import load
from sun.pictures.recipe import Recipe, RecipeError
from sun.pipelines.loading import ModelError, load_pipeline, load_unet
from sun.training.models import FrozenModels, load_frozen

Run = Callable[..., Result]
LOADERS: dict[str, Callable[[Path], Any]] = {
    "generate, compare, calibrate": lambda folder: load(Recipe(model=str(folder), adapter="none")),
    "assemble": lambda folder: load_pipeline(str(folder)),
    "train": lambda folder: load_frozen(str(folder)),
    "evaluate": lambda folder: load_sampler(EvaluateConfig(model=str(folder), adapter="init")),
}
ERRORS = (RecipeError, ConfigError)


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(model_folder, tmp_path / "broken"))


@pytest.fixture(scope="module")
def single(make_pipeline: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(diffusers folder, single file) of one tiny model with an AutoencoderKL."""
    pipe = make_pipeline()
    pipe.vae = make_vae()
    place = tmp_path_factory.mktemp("single")
    pipe.save_pretrained(place / "folder")
    save_single_file(pipe, place / "x.safetensors")
    return place / "folder", place / "x.safetensors"


def _weights_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def _change(
    file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], to: Path | None = None
) -> Path:
    tensors = change(load_file(file))
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, to or file, metadata={"format": "pt"})
    return to or file


def _told(load: Callable[[], Any]) -> tuple[Any, str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = load()
    return result, " ".join(str(w.message) for w in told)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("part", "left_out", "name"),
    [
        ("text_encoder", "layers.1.", "text encoder"),
        ("text_encoder", "final_layer_norm.bias", "text encoder"),
        ("text_encoder", "token_embedding", "text encoder"),
        ("unet", "mid_block", "U-Net"),
        ("unet", "conv_out.bias", "U-Net"),
        ("unet", "attn2.to_k", "U-Net"),
        ("vae", "decoder.layers.0.", "VAE"),
        ("vae", "encoder", "VAE"),
    ],
)
def test_a_part_that_lacks_weights_is_named_with_their_number(loader, folder, part, left_out, name):
    file = _weights_of(folder / part)
    count = sum(left_out in key for key in load_file(file))
    assert count
    _change(file, lambda tensors: {k: v for k, v in tensors.items() if left_out not in k})
    with pytest.raises(ERRORS, match=rf"the .*{name}.* lacks {count} tensor") as caught:
        LOADERS[loader](folder)
    assert left_out in str(caught.value)


def test_the_commands_end_with_that_sentence(sun: Run, folder: Path, adapter_file: Path, tmp_path: Path) -> None:
    _change(_weights_of(folder / "text_encoder"), lambda t: {k: v for k, v in t.items() if "layers.1." not in k})
    model = ("--model", folder)
    for command in (
        ("generate", "a", *model, "--adapter", adapter_file, "--out", tmp_path / "x.png"),
        ("compare", "a", *model, "--adapter", adapter_file, "--out", tmp_path / "x.png"),
        ("calibrate", "a", *model, "--steps", 4, "--out", tmp_path / "tables"),
        ("evaluate", *model, "--adapter", adapter_file, "--prompts", 2, "--set", "features=none"),
        ("train", *model, "--output", tmp_path / "run", "--steps", 1),
        ("train-peer", "lcm-lora", *model, "--output", tmp_path / "peer", "--steps", 1),
    ):
        assert "lacks 16 tensors" in sun(*command, code=2).output
    assert not (tmp_path / "x.png").exists()


def test_fine_tunes_and_distilled_u_nets_are_whole_too(folder: Path) -> None:
    unet = load_unet(folder)
    _change(_weights_of(folder / "unet"), lambda t: {k: v for k, v in t.items() if "mid_block" not in k})
    with pytest.raises(ConfigError, match="lacks"):
        FrozenModels(unet, [str(folder)])
    with pytest.raises(ModelError, match="lacks"):
        load_unet(folder)
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(ModelError, match="lacks"):
        load_unet(folder / "unet")


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("variant", ["fp16", "bf16", "ema"])
def test_a_folder_of_another_variant_alone_is_read(model_folder, folder, part, variant):
    file = _weights_of(folder / part)
    file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))
    found, expected = (getattr(load_pipeline(f), part).state_dict() for f in (folder, model_folder))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_in_several_files_are_read(model_folder, folder, part):
    whole = getattr(load_pipeline(folder), part)
    _weights_of(folder / part).unlink()
    whole.save_pretrained(folder / part, max_shard_size="20KB")
    assert len(list((folder / part).glob("*.safetensors"))) > 1
    found = getattr(load_pipeline(folder), part).state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole.state_dict().items())
    next(iter((folder / part).glob("*.safetensors"))).unlink()
    with pytest.raises(ModelError):
        load_pipeline(folder)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_a_text_encoder_of_either_age_of_names_is_read(model_folder, folder, prefix):
    _change(
        _weights_of(folder / "text_encoder"),
        lambda t: (
            {prefix + k.removeprefix("text_model."): v for k, v in t.items()}
            | {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}
        ),
    )
    (found, told), expected = _told(lambda: load_pipeline(folder)), load_pipeline(model_folder)
    for mine, theirs in zip(found.text_encoder.parameters(), expected.text_encoder.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not told


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_weights_of_no_layer_are_told(folder, part):
    _change(_weights_of(folder / part), lambda t: t | {"more.weight": torch.zeros(2)})
    assert "1 tensor (more.weight)" in _told(lambda: load_pipeline(folder))[1]


@pytest.mark.parametrize("length", [None, 2, 10**9])
def test_a_tokenizers_own_length_is_not_trusted(folder, length):
    _edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    assert load_pipeline(folder).tokenizer.model_max_length == 77


def _edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**content, **changes}.items() if v is not None}))


def _pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def _garble(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


SCHEDULE = "scheduler/scheduler_config.json"
BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "SDXL": (
        lambda f: _edit(f / "model_index.json", _class_name="StableDiffusionXLPipeline"),
        "StableDiffusionXLPipeline",
    ),
    "two text encoders": (
        lambda f: _edit(f / "model_index.json", text_encoder_2=["transformers", "X"]),
        "not a Stable Diffusion 1.x",
    ),
    "another program's class": (lambda f: _edit(f / "model_index.json", vae=["os", "system"]), "system"),
    "no name": (lambda f: _edit(f / "model_index.json", _class_name=None), "pipeline without a name"),
    "index is a list": (lambda f: _garble(f, "model_index.json", b"[]"), "names and values"),
    "index is no JSON": (lambda f: _garble(f, "model_index.json", b"{"), "not valid JSON"),
    "index in UTF-16 without mark": (lambda f: _garble(f, "model_index.json", b"\xfe{}"), "UTF-8"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
    "no U-Net": (lambda f: shutil.rmtree(f / "unet"), "lacks unet"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "lacks tokenizer"),
    "no schedule": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json"),
    "no weights": (lambda f: _weights_of(f / "unet").unlink(), "U-Net"),
    "no text encoder's config": (lambda f: (f / "text_encoder" / "config.json").unlink(), "text encoder"),
    "config of another size": (
        lambda f: _edit(f / "unet" / "config.json", sample_size=8, cross_attention_dim=24),
        "U-Net",
    ),
    "text encoder of another size": (
        lambda f: _edit(f / "text_encoder" / "config.json", intermediate_size=64),
        "text encoder",
    ),
    "a pipe for weights": (lambda f: _pipe(_weights_of(f / "text_encoder")), "not a regular file"),
    "a pipe among the tokenizer's files": (lambda f: _pipe(f / "tokenizer" / "x.json"), "not a regular file"),
    "Git LFS": (
        lambda f: _weights_of(f / "unet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid x"),
        "Git LFS",
    ),
    "cut off": (lambda f: _weights_of(f / "vae").write_bytes(_weights_of(f / "vae").read_bytes()[:-9]), "VAE"),
    "empty": (lambda f: _weights_of(f / "text_encoder").write_bytes(b""), "text encoder"),
    "noise at zero SNR": (
        lambda f: _edit(f / SCHEDULE, _class_name="DDIMScheduler", rescale_betas_zero_snr=True),
        "zero terminal SNR",
    ),
    "flow": (lambda f: _edit(f / SCHEDULE, prediction_type="flow_prediction"), "flow_prediction"),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_folders_that_are_not_a_whole_model_are_refused_in_words(folder, kind):
    change, words = BREAKS[kind]
    change(folder)
    for loader in (load_pipeline, load_frozen):
        with pytest.raises(ERRORS) as caught:
            loader(str(folder))
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_folder_with_a_scheduler_of_bounds_without_end_is_read(folder: Path) -> None:
    """diffusers writes -Infinity where DPM-Solver++ has no bound."""
    DPMSolverMultistepScheduler(steps_offset=1).save_pretrained(folder / "scheduler")
    assert "-Infinity" in (folder / "scheduler" / "scheduler_config.json").read_text()
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert isinstance(load_pipeline(str(folder)).scheduler, DPMSolverMultistepScheduler)


def test_a_folder_that_predicts_v_draws_and_says_so(sun: Run, folder: Path, adapter_file: Path, tmp_path: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    _edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    _edit(file, prediction_type="v_prediction", rescale_betas_zero_snr=True, skip_prk_steps=None)
    common = ("generate", "a", "--model", folder, "--seed", 1, "--out", tmp_path / "x.png")
    assert "note: this model predicts v" in sun(*common, "--adapter", adapter_file).output
    assert "predicts v" not in sun(*common, "--adapter", "none").output
    with pytest.raises(ConfigError, match="v_prediction"):
        load_frozen(str(folder))


MARKS = {"v_pred": ("v_prediction", False), "v_pred ztsnr": ("v_prediction", True), "": ("epsilon", False)}


@pytest.mark.parametrize("marks", MARKS)
def test_the_marks_of_a_single_file_decide_what_it_predicts(single, tmp_path, marks):
    folder, file = single
    changed = _change(
        file, lambda t: t | {name: torch.tensor([]) for name in marks.split()}, tmp_path / "x.safetensors"
    )
    config = load_pipeline(changed, config=str(folder)).scheduler.config
    assert (config.prediction_type, config.get("rescale_betas_zero_snr", False)) == MARKS[marks]


def test_a_yaml_beside_a_single_file_decides_too(single, tmp_path):
    folder, file = single
    copy = Path(shutil.copy(file, tmp_path / "x.safetensors"))
    (tmp_path / "x.yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert load_pipeline(copy, config=str(folder)).scheduler.config.prediction_type == "v_prediction"


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
CLIP = "cond_stage_model.transformer."


def _wider(tensors: dict[str, torch.Tensor], channels: int) -> dict[str, torch.Tensor]:
    first = tensors[FIRST]
    return tensors | {FIRST: torch.cat([first, torch.zeros(len(first), channels - 4, 3, 3)], 1)}


def test_single_files_with_clips_older_names_are_the_same_model(single, tmp_path):
    folder, file = single
    old = _change(
        file, lambda t: {k.replace(f"{CLIP}text_model.", CLIP): v for k, v in t.items()}, tmp_path / "x.safetensors"
    )
    for part in ("text_encoder", "unet", "vae"):
        mine, theirs = (getattr(load_pipeline(f, config=str(folder)), part).state_dict() for f in (old, file))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("left_out", "part"),
    [
        ("text_model.encoder.layers.1.", "text encoder"),
        ("output_blocks.5.1.", "U-Net"),
        ("middle_block.1.", "U-Net"),
        ("time_embed.0.", "U-Net"),
        ("first_stage_model.decoder.conv_out", "VAE"),
        ("first_stage_model.encoder.down.1", "VAE"),
    ],
)
def test_a_single_file_that_lacks_weights_is_refused_with_part_and_number(single, tmp_path, left_out, part):
    folder, file = single
    broken = _change(file, lambda t: {k: v for k, v in t.items() if left_out not in k}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=rf"{part}.* lacks \d+ tensor") as caught:
        load_pipeline(broken, config=str(folder))
    assert "meta" not in str(caught.value)


@pytest.mark.parametrize(
    ("channels", "words"), [(8, "InstructPix2Pix"), (5, "depth-to-image"), (7, "upscaler"), (6, "6 channels")]
)
def test_single_files_of_other_kinds_are_named(single, tmp_path, channels, words):
    folder, file = single
    with pytest.raises(ModelError, match=words):
        load_pipeline(_change(file, lambda t: _wider(t, channels), tmp_path / "x.safetensors"), config=str(folder))


def test_an_inpainting_checkpoint_draws_under_a_mask_and_nothing_else(
    sun: Run, single: tuple[Path, Path], tmp_path: Path, photo: Path, full_depth_adapter: Path
) -> None:
    folder, file = single
    nine = _change(file, lambda t: _wider(t, 9), tmp_path / "x.safetensors")
    common = (
        "generate",
        "a",
        "--model",
        nine,
        "--config",
        folder,
        "--adapter",
        full_depth_adapter,
        "--seed",
        1,
        "--out",
        tmp_path / "x.png",
    )
    assert "inpainting model" in sun(*common, code=2).output
    assert "inpainting model" in sun(*common, "--init", photo, code=2).output
    mask = tmp_path / "mask.png"
    Image.fromarray(np.tile(np.array([[0, 255]], np.uint8).repeat(32, 1), (64, 1))).save(mask)
    assert "4 U-Net calls" in sun(*common, "--init", photo, "--mask", mask).output
    with pytest.raises(ConfigError, match="inpainting"):
        load_frozen(str(_folder_of(nine, folder, tmp_path)))
    for command in (
        ("compare", "a", "--out", tmp_path / "y.png"),
        ("calibrate", "a", "--steps", 4, "--out", tmp_path / "t"),
    ):
        given = ("--adapter", full_depth_adapter) if command[0] == "compare" else ()
        assert "inpainting model" in sun(*command, "--model", nine, "--config", folder, *given, code=2).output


def _folder_of(file: Path, config: Path, place: Path) -> Path:
    load_pipeline(file, config=str(config)).save_pretrained(place / "nine")
    return place / "nine"


# --- NaN ---------------------------------------------------------------------------------------------------------


def _poison(key: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(k for k in tensors if key in k)
        poisoned = tensors[name].clone()
        poisoned.view(-1)[0] = float("nan")
        return tensors | {name: poisoned}

    return change


@pytest.mark.parametrize(
    ("part", "key"),
    [("unet", "mid_block"), ("unet", "conv_out.bias"), ("vae", "decoder"), ("text_encoder", "final_layer_norm")],
)
def test_a_damaged_weight_makes_no_picture_and_is_named(sun, folder, adapter_file, tmp_path, photo, part, key):
    _change(_weights_of(folder / part), _poison(key))
    common = ("--model", folder, "--adapter", adapter_file)
    for command in (
        ("generate", "a", "--out", tmp_path / "x.png"),
        ("generate", "a", "--init", photo, "--strength", 1, "--out", tmp_path / "x.png"),
        ("compare", "a", "--out", tmp_path / "x.png"),
        ("evaluate", "--prompts", 2, "--set", "features=none", "--set", "methods=sun-2"),
    ):
        output = sun(*command, *common, code=2).output
        assert "NaN" in output
        assert key in output
    assert not (tmp_path / "x.png").exists()


def test_a_table_is_not_made_of_nan(sun, folder, tmp_path):
    _change(_weights_of(folder / "unet"), _poison("mid_block"))
    output = sun(
        "calibrate", "a", "--model", folder, "--steps", 4, "--last", 0, "--tau", 0, "--out", tmp_path / "t", code=2
    ).output
    assert "NaN" in output
    assert not list(tmp_path.glob("t/*"))


@pytest.mark.parametrize("option", ["--sun-strength", "--control-scale", "--guidance", "--strength"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_that_are_none_are_refused(tiny, tmp_path, photo, option, value):
    given = ("--init", photo) if option == "--strength" else ()
    tiny("generate", "a", option, value, *given, "--out", tmp_path / "x.png", code=2)
    assert not (tmp_path / "x.png").exists()
