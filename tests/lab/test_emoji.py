"""Emoji Diffusion's data and training, on small packages made here in the published packages' layout."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL import Image
from small_models import COLOURS, EMOJIS, make_run
from transformers import CLIPTokenizer

from sun.common.settings import ConfigError
from sun.lab.emoji import scenes, sources
from sun.lab.emoji.base import SAMPLE_PROMPTS, BaseConfig, build_text_encoder, build_tokenizer, train_base
from sun.lab.emoji.latents import encode_pictures
from sun.lab.emoji.scenes import BACKGROUNDS, Scene, caption_of, random_scene, render_scene
from sun.lab.emoji.ship import captioned_grid, ship_base
from sun.lab.emoji.text_pretraining import SceneReader, pretrain_text
from sun.lab.emoji.vae import VaeConfig, reconstruction_loss, to_tensor, train_vae
from sun.training.card import name_of


def test_metadata_leaves_flags_out(packages: Path) -> None:
    assert [e.name for e in sources.load_metadata("all")] == [e.name for e in EMOJIS]


def test_the_everyday_vocabulary_is_the_smaller_one() -> None:
    everyday, wide = (sources.load_metadata(v) for v in ("everyday", "wide"))
    assert 100 < len(everyday) < 130
    assert len(wide) > 250
    names = [e.name for e in everyday]
    assert set(names) < {e.name for e in wide}
    assert len(set(names)) == len(names)
    assert "eggplant" in names
    for prompt in SAMPLE_PROMPTS:
        subject = prompt.split(",")[0].removeprefix("large ").removeprefix("small ").split(" and ")[0]
        assert subject.split(" next to ")[0] in names


def test_all_emoji_have_the_names_of_the_vocabulary(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = json.loads(sources.VOCABULARY_FILE.read_text())
    listed[1] |= {"name": "fruit", "everyday": False}
    sources.VOCABULARY_FILE.write_text(json.dumps(listed))
    assert [e.name for e in sources.load_metadata("all")][:3] == ["polar bear", "fruit", "snake"]
    assert [e.name for e in sources.load_metadata("everyday")][:2] == ["polar bear", "snake"]
    assert [e.name for e in sources.load_metadata("wide")][:2] == ["polar bear", "fruit"]


def test_what_does_not_exist_is_named(packages: Path) -> None:
    with pytest.raises(ConfigError, match="everyday, wide, all"):
        sources.load_metadata("some")
    with pytest.raises(ConfigError, match="twemoji, openmoji, fluent, google"):
        sources.load_pictures("noto", EMOJIS)


def test_an_alias_that_two_emoji_share_is_nobodys() -> None:
    cloud = replace(EMOJIS[0], name="cloud with lightning", aliases=("lightning", "storm"))
    flash = replace(EMOJIS[1], name="lightning", aliases=("lightning", "zap"))
    assert [e.aliases for e in sources._unambiguous([cloud, flash])] == [("storm",), ("zap",)]


def test_pictures_are_rendered_at_the_asked_size(packages: Path) -> None:
    pictures = sources.load_pictures("twemoji", sources.load_metadata(), 48)
    assert set(pictures) == {e.code for e in EMOJIS}
    assert pictures[EMOJIS[0].code].size == (48, 48)
    assert pictures[EMOJIS[0].code].getpixel((24, 24)) == (255, 0, 0, 255)


def test_without_npm_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUN_CACHE", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(ConfigError, match=r"install Node\.js"):
        sources.load_metadata("all")
    assert sources.load_metadata("everyday")  # its names are in the package


@pytest.mark.parametrize("style", sorted(sources.STYLES))
def test_every_style_has_the_pictures_its_package_has(style: str, packages: Path) -> None:
    pictures = sources.load_pictures(style, EMOJIS, 16)
    assert list(pictures) == [e.code for e in EMOJIS]
    for picture, colour in zip(pictures.values(), COLOURS, strict=True):
        assert picture.mode == "RGBA"
        assert picture.getpixel((8, 8)) == (*bytes.fromhex(colour), 255)


@pytest.mark.parametrize("style", sorted(sources.STYLES))
def test_every_style_states_its_licence(style: str) -> None:
    assert sources.STYLES[style].licence
    assert sources.STYLES[style].attribution


def test_a_scene_shows_what_it_says() -> None:
    red = {e.code: Image.new("RGBA", (64, 64), (255, 0, 0, 255)) for e in EMOJIS}
    scene = Scene((EMOJIS[0],), "blue", "small", "left", False, "")
    image = render_scene(scene, red, 64)
    assert image.getpixel((60, 60)) == BACKGROUNDS["blue"]
    assert image.getpixel((10, 32)) == (255, 0, 0)
    assert image.getpixel((50, 32)) == BACKGROUNDS["blue"]
    large = render_scene(replace(scene, size="large", place=""), red, 64)
    assert large.getpixel((50, 32)) == (255, 0, 0)
    pair = render_scene(replace(scene, emojis=(EMOJIS[0], EMOJIS[1]), size="", place=""), red, 64)
    assert pair.getpixel((16, 32)) == pair.getpixel((48, 32)) == (255, 0, 0)
    assert pair.getpixel((32, 2)) == BACKGROUNDS["blue"]


def test_mirroring_mirrors() -> None:
    half = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    half.paste((255, 0, 0, 255), (0, 0, 32, 64))
    scene = Scene((EMOJIS[0],), "white", "large", "", False, "")
    assert render_scene(scene, {EMOJIS[0].code: half}, 64).getpixel((16, 32)) == (255, 0, 0)
    mirrored = render_scene(replace(scene, mirrored=True), {EMOJIS[0].code: half}, 64)
    assert mirrored.getpixel((16, 32)) == BACKGROUNDS["white"]
    assert mirrored.getpixel((48, 32)) == (255, 0, 0)


def test_captions_name_the_emoji_and_only_true_attributes() -> None:
    rng = random.Random(0)
    for _ in range(500):
        scene = random_scene(EMOJIS, rng)
        words = caption_of(scene, rng).replace(",", "").split()
        for emoji in scene.emojis:
            assert any(name.split()[0] in words for name in (emoji.name, *emoji.aliases))
        for size in filter(None, scenes.SIZES):
            assert (size in words) <= (scene.size == size)
        assert ("mirrored" in words) <= scene.mirrored
        if "background" in words:
            assert words[words.index("background") - 1] == scene.background


def test_tokenizer_spells_anything_and_pads_as_clip(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(EMOJIS, 700, tmp_path)
    assert 514 < len(tokenizer) <= 700
    again = CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("large polar bear, yellow background", "", "ünicorn 3 !?"):
        ids = again(text, padding="max_length", truncation=True, max_length=77).input_ids
        assert ids == tokenizer(text, padding="max_length", truncation=True, max_length=77).input_ids
        assert len(ids) == 77
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.tokenize("polar bear") == ["polar</w>", "bear</w>"]


def test_reconstruction_loss_vanishes_on_equal_pictures_and_sees_edges() -> None:
    flat = torch.zeros(1, 3, 8, 8)
    striped = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 3, 8, 8)
    assert reconstruction_loss(flat, flat, 0.5) == 0
    assert reconstruction_loss(flat, striped, 1.0) > reconstruction_loss(flat, striped, 0.0)


def test_to_tensor_spans_minus_one_to_one() -> None:
    tensor = to_tensor([Image.new("RGB", (2, 2), "white"), Image.new("RGB", (2, 2), "black")])
    assert tensor.shape == (2, 3, 2, 2)
    assert (tensor[0] == 1).all()
    assert (tensor[1] == -1).all()


def test_captioned_grid_has_room_for_every_picture() -> None:
    page = captioned_grid([Image.new("RGB", (32, 32), "red")] * 5, ["a red square"] * 5, 2)
    assert page.height > 3 * 32
    assert page.width >= 2 * 32


@pytest.mark.slow  # seven trainings
def test_the_whole_chain_from_pictures_to_a_shipped_folder(packages: Path, tmp_path: Path) -> None:
    vae = train_vae(VaeConfig(run=make_run(tmp_path, "vae"), size=32, crop=16))
    config = BaseConfig(
        run=make_run(tmp_path, "base"), vae=str(vae), stages=((16, 0.5), (32, 0.5)), scenes=8,
        channels=(32, 32, 32, 32), heads=2, text_width=32, text_layers=1, vocabulary=700, text_steps=2, text_batch=4,
    )  # fmt: skip
    train_base(config)
    out = ship_base(str(tmp_path / "base"), str(tmp_path / "shipped"), 3.0, vae_runs=[tmp_path / "vae"])
    tokenizer = json.loads((out / "tokenizer" / "tokenizer.json").read_text())
    assert tokenizer["truncation"] is tokenizer["padding"] is None
    pipe = StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    assert pipe("polar bear", num_inference_steps=2).images[0].size == (32, 32)
    card = (out / "README.md").read_text()
    for fact in (
        "CC-BY 4.0",
        sources.STYLES["twemoji"].package,
        "Seed 0",
        "| text encoder and U-Net | 2 |",
        "| backgrounds of another hue, of 12 |",
    ):
        assert fact in card
    assert "| backgrounds of another hue, of 12 |" in card
    assert (out / "samples.png").exists()
    assert not [f for f in out.rglob("*.json") if str(tmp_path) in f.read_text()]
    for folder in (tmp_path / "base" / "model", out):
        assert name_of(str(folder)) == "Emoji Diffusion", "whatever the folder is called"
    # A later run goes on from the shipped folder.
    again = replace(config, run=make_run(tmp_path, "more", steps=1, lr=0.0), init_model=str(out))
    unet = StableDiffusionPipeline.from_pretrained(train_base(again), safety_checker=None).unet
    for name, weight in pipe.unet.state_dict().items():
        assert torch.allclose(unet.state_dict()[name].float(), weight.float(), atol=1e-3)
    # A text encoder that is pretrained and then frozen is the same one when the run goes on.
    frozen = replace(config, run=make_run(tmp_path, "frozen", steps=1), train_text=False)
    first = StableDiffusionPipeline.from_pretrained(train_base(frozen), safety_checker=None).text_encoder
    longer = replace(frozen, run=make_run(tmp_path, "frozen", steps=2))
    second = StableDiffusionPipeline.from_pretrained(train_base(longer), safety_checker=None).text_encoder
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    # Without the text encoder: the U-Net learns, the encoder stays.
    alone = replace(config, run=make_run(tmp_path, "alone", lr=0.01), init_model=str(out), train_text=False)
    trained = StableDiffusionPipeline.from_pretrained(train_base(alone), safety_checker=None)
    for part, moved in ((trained.text_encoder, False), (trained.unet, True)):
        before = (pipe.unet if part is trained.unet else pipe.text_encoder).state_dict()
        assert any(not torch.equal(before[n].float(), w.float()) for n, w in part.state_dict().items()) == moved


def test_a_frozen_encoder_keeps_latents_valid(packages: Path, tmp_path: Path) -> None:
    first = train_vae(VaeConfig(run=make_run(tmp_path, "vae"), size=32, crop=16))
    config = VaeConfig(run=make_run(tmp_path, "more"), size=32, crop=16, init_vae=str(first), freeze_encoder=True)
    before, after = (AutoencoderTiny.from_pretrained(f) for f in (first, train_vae(config)))
    assert all(torch.equal(a, b) for a, b in zip(before.encoder.parameters(), after.encoder.parameters(), strict=True))
    assert any(
        not torch.equal(a, b) for a, b in zip(before.decoder.parameters(), after.decoder.parameters(), strict=True)
    )


@pytest.mark.parametrize(("steps", "first"), [(45, 0.3), pytest.param(250, 0.9, marks=pytest.mark.slow)])
def test_the_text_encoder_learns_what_captions_look_like(tmp_path: Path, steps: int, first: float) -> None:
    """Latents that say nothing but the background: states must come to tell backgrounds and emoji apart."""
    rng = random.Random(0)
    drawn = [random_scene(EMOJIS, rng) for _ in range(64)]
    shades = {name: i for i, name in enumerate(BACKGROUNDS)}
    latents = torch.stack([torch.full((4, 2, 2), float(shades[s.background])) for s in drawn])
    latents = (latents - latents.mean()) / latents.std()
    tokenizer = build_tokenizer(EMOJIS, 700, tmp_path)
    torch.manual_seed(0)
    encoder = build_text_encoder(BaseConfig(text_width=32, text_layers=1), tokenizer)
    learned = pretrain_text(tokenizer, encoder, drawn, latents, steps=steps, batch_size=32)
    assert learned["picture"] < 0.7
    assert learned["first"] > first


def test_a_reader_knows_what_a_scene_shows() -> None:
    one = Scene((EMOJIS[1],), "red", "large", "left", True, "")
    two = Scene((EMOJIS[0], EMOJIS[2]), "blue", "", "", False, "")
    reader = SceneReader(8, [e.code for e in EMOJIS], 16)
    labels = reader.labels([one, two])
    names = {name: [reader.choices[name][i] for i in row.tolist()] for name, row in labels.items()}
    assert names["first"] == [EMOJIS[1].code, EMOJIS[0].code]
    assert names["second"] == ["none", EMOJIS[2].code]
    assert names["background"] == ["red", "blue"]
    assert (names["size"], names["place"], names["mirrored"]) == (["large", ""], ["left", ""], [True, False])
    for name, head in reader.heads.items():
        assert head(torch.zeros(1, 8)).shape[1] == len(reader.choices[name])


def test_latents_of_scenes_are_kept_whatever_their_layout(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUN_CACHE", str(tmp_path))
    vae = AutoencoderTiny.from_pretrained(tiny_model / "vae")

    def encoded() -> torch.Tensor:
        return encode_pictures(vae, "flat", "red", 3, lambda i: Image.new("RGB", (64, 64), "red"))

    first = encoded()
    assert len(list(tmp_path.rglob("flat-3-*.safetensors"))) == 1
    assert first.is_contiguous()
    assert torch.equal(encoded(), first)
