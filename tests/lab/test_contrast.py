"""The image-text model of emoji: what its texts claim, its loss, its training and its files."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import EMOJIS, make_run

from sun.common.settings import ConfigError, apply, read_config
from sun.lab.emoji.contrast import ContrastShape, EmojiContrast
from sun.lab.emoji.contrast_training import ContrastConfig, augment, contrastive_loss, fitting, train_contrast
from sun.lab.emoji.pairs import Pair, ScenePool, caption, full_caption, phrases
from sun.lab.emoji.scenes import Scene, random_scene
from sun.lab.emoji.ship import ship_folder
from sun.lab.emoji.sources import STYLES, load_metadata

SMALL = ContrastShape(size=32, widths=(16, 32), text_width=32, text_layers=1, text_heads=2, dim=32)
BEAR, APPLE = EMOJIS[:2]


def test_every_text_is_true_of_its_scene_and_false_where_it_contradicts() -> None:
    rng = random.Random(0)
    for _ in range(300):
        scene = random_scene(EMOJIS, rng)
        for statement in (caption(scene, rng), full_caption(scene), phrases(scene, rng)):
            assert statement.true_of(scene)
            other = replace(scene, background="red" if scene.background != "red" else "blue")
            assert statement.true_of(other) == (not statement.background)
            if f"{scene.background} background" in statement.text:
                assert statement.background == scene.background


def test_the_order_of_a_pair_counts_where_it_is_said() -> None:
    pair = Scene((BEAR, APPLE), "white", "", "", False, "")
    assert full_caption(pair).text == "polar bear on the left and red apple on the right, white background"
    assert not full_caption(pair).true_of(replace(pair, emojis=(APPLE, BEAR)))
    unordered = replace(full_caption(pair), ordered=False)
    assert unordered.true_of(replace(pair, emojis=(APPLE, BEAR)))
    assert not unordered.true_of(replace(pair, emojis=(BEAR,)))


def test_held_out_combinations_never_occur_in_training(packages: Path) -> None:
    pool = ScenePool(tuple(STYLES), load_metadata(), held_out=0.3)
    rng = random.Random(0)
    pairs = pool.pairs(400, rng)
    assert len(pairs) == 400
    assert {p.style for p in pairs} == set(STYLES)
    assert not any(pool.is_held_out(p.scene) for p in pairs)
    checked = [pool.scene("google", rng, held_out=True) for _ in range(20)]
    assert all(pool.is_held_out(s) for s in checked)
    with pytest.raises(ConfigError, match="leaves no scenes to check"):
        ScenePool(("twemoji",), load_metadata(), held_out=0.0).scene("twemoji", rng, held_out=True)
    with pytest.raises(ConfigError, match="twemoji, openmoji"):
        ScenePool(("noto-emoji",), load_metadata(), held_out=0.1)


def test_the_loss_is_clips_and_ignores_texts_that_also_fit() -> None:
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(6, 8), dim=-1) for _ in range(2))
    scale = torch.tensor(10.0)
    loss, _ = contrastive_loss(images, texts, scale, torch.eye(6, dtype=torch.bool))
    logits = scale * images @ texts.T
    own = (logits.log_softmax(0).diagonal() + logits.log_softmax(1).diagonal()) / 2
    assert torch.allclose(loss, -own.mean(), atol=1e-6)
    # The same emoji twice: whoever finds either text is right, so the loss of a perfect model is that of one fewer.
    twice = torch.eye(4)[[0, 1, 2, 0]]
    scene = Scene((BEAR,), "white", "", "", False, "")
    scenes = [replace(scene, background=b) for b in ("white", "red", "blue", "white")]
    fits = fitting([Pair("twemoji", s, full_caption(s)) for s in scenes])
    assert fits.tolist() == (twice @ twice.T).bool().tolist()
    perfect, found = contrastive_loss(twice, twice, torch.tensor(100.0), fits)
    assert perfect < 1e-6
    assert found == 1
    assert contrastive_loss(twice, twice, torch.tensor(100.0), torch.eye(4, dtype=torch.bool))[0] > 0.3


def test_augmentation_keeps_the_layout() -> None:
    torch.manual_seed(0)
    pixels = -torch.ones(8, 3, 32, 32)
    pixels[..., :16] = 1
    changed = augment(pixels)
    assert changed.shape == pixels.shape
    assert changed.abs().max() <= 1
    assert (changed[..., 2:14].mean((1, 2, 3)) > 0.6).all()
    assert (changed[..., 18:30].mean((1, 2, 3)) < -0.6).all()


def contrast_config(folder: Path, tokenizer: Path, **settings: object) -> ContrastConfig:
    return ContrastConfig(
        run=make_run(folder, "contrast", **settings), shape=SMALL, tokenizer=str(tokenizer), check_scenes=20,
        candidates=10,
    )  # fmt: skip


def test_training_writes_a_model_with_its_figures_and_card(packages: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = train_contrast(contrast_config(tmp_path, tiny_model / "tokenizer", batch_size=4))
    model = EmojiContrast.load(folder)
    pixels, texts = torch.rand(3, 3, 48, 40) * 2 - 1, ["polar bear", "", "snake, red background"]
    images, said = model.image_features(pixels), model.text_features(texts)
    assert images.shape == said.shape == (3, 32)
    assert torch.allclose(images.norm(dim=-1), torch.ones(3))
    assert torch.allclose(said.norm(dim=-1), torch.ones(3))
    assert torch.allclose(model.agreement(pixels, texts), (images * said).sum(-1))
    assert torch.allclose(said[:1], model.text_features(texts[:1]), atol=1e-5)  # padding changes nothing
    assert [m.shape for m in model.image_maps(pixels)] == [(3, 16, 16, 16), (3, 32, 8, 8)]
    assert not any(p.requires_grad for p in model.parameters())
    figures = json.loads((folder / "figures.json").read_text())
    assert set(figures["styles"]) == set(ContrastConfig().styles)
    assert set(figures["mean"]) == set(figures["chance"])
    assert str(tmp_path) not in json.dumps(figures)
    card = (folder / "README.md").read_text()
    for fact in (
        "license: cc-by-sa-4.0",
        *(STYLES[s].attribution for s in ContrastConfig().styles),
        "2 steps of batch 1 x 4",
    ):
        assert fact in card
    shipped = ship_folder(folder, tmp_path / "shipped", "More was tried.")
    assert "More was tried." in (shipped / "README.md").read_text()
    again = EmojiContrast.load(shipped)
    assert torch.equal(again.image_features(pixels), images)


def test_it_learns_backgrounds_on_combinations_it_never_saw(packages: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = contrast_config(
        tmp_path, tiny_model / "tokenizer", steps=80, batch_size=32, lr=3e-3, warmup_steps=10, ema_decay=0.9
    )
    config.check_scenes = 40
    mean = json.loads((train_contrast(config) / "figures.json").read_text())["mean"]
    assert mean["background"] > 3 / 12
    assert mean["image_to_text"] > 2 / 10


def test_the_default_model_fits_three_megabytes() -> None:
    from transformers import CLIPTokenizer

    from sun.shipped import EMOJI_DIFFUSION

    model = EmojiContrast(ContrastShape(), CLIPTokenizer.from_pretrained(EMOJI_DIFFUSION / "tokenizer"))
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 1.49e6


def test_a_missing_model_is_named_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="sun train-emoji contrast"):
        EmojiContrast.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="a run that has ended"):
        ship_folder(tmp_path, tmp_path / "out")


def test_the_configuration_file_is_valid() -> None:
    path = Path(__file__).parents[2] / "configs" / "emoji-contrast.toml"
    assert apply(ContrastConfig(), read_config(path), str(path)).run.minutes == 21
