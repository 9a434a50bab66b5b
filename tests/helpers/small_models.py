"""A Stable Diffusion small enough to train for a few steps in a test, saved as a diffusers folder."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from sun.lab.emoji import base, checks, sources
from sun.lab.emoji.base import BaseConfig, build_text_encoder, build_tokenizer, sd15_scheduler
from sun.lab.emoji.sources import METADATA_PACKAGE, STYLES, Emoji
from sun.training import sun as training_sun
from sun.training.config import RunConfig

assert base.SAMPLE_STEPS == checks.REFERENCE_STEPS == training_sun.REFERENCE_STEPS == 25, "what users get"

EMOJIS = [
    Emoji(f"1f{i:03x}", name, (name.split()[0],), "Animals & Nature", "animal")
    for i, name in enumerate(("polar bear", "red apple", "snake", "rocket", "owl", "crab"))
]


SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 36 36"><rect width="36" height="36" fill="#{}"/></svg>'
COLOURS = ("ff0000", "00ff00", "0000ff", "ffff00", "ff00ff", "00ffff")


def make_run(folder: Path, name: str, **settings: object) -> RunConfig:
    """A run of two steps of two pictures in fp32, into ``folder/name``."""
    defaults = {"steps": 2, "batch_size": 2, "ema_decay": 0.5, "precision": "fp32"}
    return RunConfig(output=str(folder / name), **{**defaults, **settings})


def write_package(folder: Path, spec: str, files: dict[str, bytes]) -> None:
    name, _, version = spec.rpartition("@")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz", "w:gz") as tar:
        for path, data in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def draw_square(colour: str, suffix: str) -> bytes:
    if suffix == "svg":
        return SVG.format(colour).encode()
    data = io.BytesIO()
    Image.new("RGBA", (64, 64), f"#{colour}").save(data, suffix)
    return data.getvalue()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds the metadata and the packages of every style, with six coloured squares for pictures."""
    monkeypatch.setenv("SUN_CACHE", str(tmp_path / "cache"))
    listed = [{**asdict(e), "everyday": True} for e in EMOJIS]
    (tmp_path / "vocabulary.json").write_text(json.dumps(listed))
    monkeypatch.setattr(sources, "VOCABULARY_FILE", tmp_path / "vocabulary.json")
    rows = [
        {"unified": e.code.upper(), "name": e.name.upper(), "short_name": e.aliases[0], "short_names": list(e.aliases),
         "category": e.category, "subcategory": e.subcategory, "sort_order": i}
        for i, e in enumerate(EMOJIS)
    ]  # fmt: skip
    rows.append({**rows[0], "unified": "1F1E6", "category": "Flags", "subcategory": "country-flag", "sort_order": 99})
    folder = tmp_path / "cache" / "packages"
    write_package(folder, METADATA_PACKAGE, {"package/emoji.json": json.dumps(rows).encode()})
    for style in STYLES.values():
        drawn = zip(EMOJIS, COLOURS, strict=True)
        if style.suffix == "json":
            square = '<path fill="#{}" d="M0 0h8v8H0z"/>'
            icons = {e.name.replace(" ", "-"): {"body": square.format(c)} for e, c in drawn}
            content = {"icons": icons, "aliases": {"other": {"parent": "nowhere"}}, "width": 8, "height": 8}
            write_package(folder, style.package, {f"{style.folder}/icons.json": json.dumps(content).encode()})
            continue
        files = {f"{style.folder}/{e.code}.{style.suffix}": draw_square(c, style.suffix) for e, c in drawn}
        write_package(folder, style.package, files)
    return folder


@pytest.fixture(autouse=True)
def short_previews(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a training draws to look at, in 3 steps instead of 25."""
    monkeypatch.setattr(base, "SAMPLE_STEPS", 3)
    monkeypatch.setattr(checks, "REFERENCE_STEPS", 3)
    monkeypatch.setattr(training_sun, "REFERENCE_STEPS", 3)


@pytest.fixture
def short_reference(monkeypatch: pytest.MonkeyPatch) -> str:
    """The reference of every evaluation in 5 steps instead of 25: for tests of reports, not of pictures."""
    from sun.evaluation import run  # and with it every module that knows the reference
    from sun.evaluation.names import parse_method

    assert hasattr(run, "report")
    short = parse_method("dpmpp-5")
    users = [m for name, m in sys.modules.items() if name.startswith("sun.evaluation.") and hasattr(m, "REFERENCE")]
    for module in users:
        monkeypatch.setattr(module, "REFERENCE", short)
    return short.text


STAGES = (("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"),) * 3 + (("DownBlock2D", "UpBlock2D"),)
"""Stable Diffusion's, on the way down and on the way up."""


def _save_model(folder: Path, layers_per_block: int, stages: tuple[tuple[str, str], ...]) -> Path:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(EMOJIS, 700, folder / "vocabulary")
    text_encoder = build_text_encoder(BaseConfig(text_width=32, text_layers=1), tokenizer)
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(32,) * len(stages), cross_attention_dim=32, attention_head_dim=2,
        layers_per_block=layers_per_block, norm_num_groups=8,
        down_block_types=tuple(down for down, _ in stages), up_block_types=tuple(up for _, up in reversed(stages)),
    )  # fmt: skip
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1), scaling_factor=0.5,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=sd15_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "model")  # fmt: skip
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outermost and the innermost of Stable Diffusion's stages with one layer each: calls are where most of a
    test's seconds go."""
    return _save_model(tmp_path_factory.mktemp("tiny-model"), 1, (STAGES[0], STAGES[-1]))


@pytest.fixture(scope="session")
def full_depth_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of its stages with its two layers each, as plans of compact U-Nets count them."""
    return _save_model(tmp_path_factory.mktemp("full-depth-model"), 2, STAGES)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of captioned pictures (plain colours), x.png beside x.txt."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (40, 56), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{colour} background")
    return folder
