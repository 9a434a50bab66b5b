"""Emoji Diffusion in other styles: fine-tunes and LoRAs, and who can load them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open
from small_models import make_run
from typer.testing import CliRunner

from sun.common.settings import ConfigError, apply, read_config
from sun.lab.emoji.base import BaseConfig, train_base
from sun.lab.emoji.recoding import RecodeConfig, recode
from sun.lab.emoji.sources import STYLES
from sun.lab.emoji.style import (
    LORA_TARGETS,
    LORA_WEIGHTS,
    LoraStyleConfig,
    StyleConfig,
    save_lora,
    train_lora,
    train_style,
)
from sun.lab.emoji.vae import VaeConfig, train_vae
from sun.training.config import RunConfig


def load(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def settings(folder: Path, model: Path, style: str) -> dict:
    stages = ((32, 1.0),)
    return {"run": make_run(folder, style), "model": str(model), "style": style, "scenes": 6, "stages": stages}


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_a_fine_tune_changes_what_it_says_it_changes(
    packages: Path, tiny_model: Path, tmp_path: Path, train_text_encoder: bool
) -> None:
    config = StyleConfig(**settings(tmp_path, tiny_model, "fluent"), train_text_encoder=train_text_encoder)
    folder = train_style(config)
    before, after = load(tiny_model), load(folder)
    assert not equal(before.unet, after.unet)
    assert equal(before.text_encoder, after.text_encoder) == (not train_text_encoder)
    assert equal(before.vae, after.vae)
    assert before.tokenizer.get_vocab() == after.tokenizer.get_vocab()
    card = (folder / "README.md").read_text()
    for fact in ("license: cc-by-4.0", STYLES["fluent"].attribution, STYLES["twemoji"].attribution, "--style fluent"):
        assert fact in card
    travelling = [*folder.rglob("*.json"), folder.parent / "settings.json"]
    assert not [f for f in travelling if str(tmp_path) in f.read_text() or str(tiny_model) in f.read_text()]


def test_a_style_trains_at_the_models_own_size_by_default(
    packages: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = StyleConfig(**{**settings(tmp_path, tiny_model, "google"), "stages": ()})
    config.run.output = ""
    assert train_style(config) == Path("runs/emoji-google/model")
    assert config.stages == ((32, 1.0),)


def test_a_lora_trains_and_loads_with_its_card(packages: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = LoraStyleConfig(**settings(tmp_path, tiny_model, "openmoji"), rank=4)
    config.run.lr = 0.1
    folder = train_lora(config)
    pipe = load(tiny_model)
    torch.manual_seed(0)
    x, text = torch.randn(2, 4, 4, 4), torch.randn(2, 77, 32)
    plain = pipe.unet(x, 500, text).sample
    pipe.load_lora_weights(folder, adapter_name="style")
    assert (pipe.unet(x, 500, text).sample - plain).abs().max() > 1e-3
    with safe_open(folder / LORA_WEIGHTS, "pt") as file:
        assert file.metadata()["style"] == "openmoji"
        assert len(file.keys()) == 3 * 4 * 8  # down, up and alpha of q, k, v and out in 8 attention layers
    card = (folder / "README.md").read_text()
    for fact in ("license: cc-by-sa-4.0", "Rank 4", STYLES["openmoji"].attribution, "--style openmoji"):
        assert fact in card
    assert json.loads((folder / "settings.json").read_text())["model"] == tiny_model.parent.name


@torch.no_grad()
def test_a_saved_lora_gives_the_same_numbers_in_diffusers(tiny_model: Path, tmp_path: Path) -> None:
    trained = load(tiny_model).unet
    trained.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=LORA_TARGETS))
    save_lora(trained, tmp_path)
    pipe = load(tiny_model)
    torch.manual_seed(0)
    x, text = torch.randn(2, 4, 4, 4), torch.randn(2, 77, 32)
    plain = pipe.unet(x, 500, text).sample
    pipe.load_lora_weights(tmp_path)
    expected, got = trained(x, 500, text).sample, pipe.unet(x, 500, text).sample
    assert (expected - plain).abs().max() > 0.05
    assert torch.allclose(got, expected, atol=2e-3 * expected.abs().max().item())


def test_unknown_styles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"style takes twemoji, openmoji, .*streamline, not 'noto'"):
        train_style(StyleConfig(style="noto"))
    for train, config in ((train_base, BaseConfig), (train_vae, VaeConfig), (recode, RecodeConfig)):
        asked = config(style="noto", run=RunConfig(output=str(tmp_path / "run")))
        with pytest.raises(ConfigError, match="style takes twemoji"):
            train(asked)
    assert not any(tmp_path.iterdir()), "refused before a folder is made"


def test_the_commands_refuse_an_unknown_style_with_one_sentence() -> None:
    from sun.cli import app

    for command in ("style", "lora"):
        done = CliRunner().invoke(app, ["train-emoji", command, "--style", "noto"])
        assert done.exit_code == 2
    for command in ("contrast", "style", "lora"):
        assert CliRunner().invoke(app, ["train-emoji", command, "--help"]).exit_code == 0


@pytest.mark.parametrize(("name", "config"), [("style", StyleConfig()), ("lora", LoraStyleConfig())])
def test_the_configuration_files_are_valid(name: str, config: StyleConfig | LoraStyleConfig) -> None:
    path = Path(__file__).parents[2] / "configs" / f"emoji-{name}.toml"
    assert apply(config, read_config(path), str(path)).run.output == ""
