"""Whether colours survive guidance: measured on the shipped autoencoder, on an ideal one, and while training one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from sun.cli import app
from sun.common.settings import ConfigError
from sun.lab.emoji import checks, colours
from sun.lab.emoji.colours import keeps_hue, load_autoencoder, measure, table
from sun.lab.emoji.scenes import BACKGROUNDS
from sun.lab.emoji.vae import Autoencoding, ColourMap, VaeConfig


class AffineAutoencoder(torch.nn.Module):
    """Latents whose first three channels are an invertible affine function of the small picture's colours."""

    def __init__(self) -> None:
        super().__init__()
        self.map = ColourMap(fitted=False)

    def encode(self, pixels: torch.Tensor) -> Any:
        small = F.avg_pool2d(pixels, 8) - self.map.offset.view(1, 3, 1, 1)
        back = torch.linalg.inv(self.map.linear[:, :3])
        latents = torch.einsum("zr,brhw->bzhw", back, small)
        return SimpleNamespace(latents=F.pad(latents, (0, 0, 0, 0, 0, 1)))

    def decode(self, latents: torch.Tensor) -> Any:
        return SimpleNamespace(sample=F.interpolate(self.map(latents), scale_factor=8))


@pytest.fixture(scope="module")
def shipped() -> colours.Colours:
    return measure(load_autoencoder("emoji"))


def test_an_affine_autoencoder_keeps_every_colour() -> None:
    found = measure(AffineAutoencoder(), {"frog": (100, 180, 60), "flame": (240, 140, 30)})
    assert found.changed == {scale: [] for scale in colours.SCALES}
    assert found.kept[0.1] == 1.0
    assert found.decoded["red"][1.0] == BACKGROUNDS["red"]
    assert found.decoded["red"][0.5] != found.decoded["red"][2.0]
    assert found.misfit < 1e-3
    fitted = torch.tensor(found.linear)[:3].T
    torch.testing.assert_close(fitted, torch.tensor(ColourMap.FIXED)[:, :3], atol=1e-3, rtol=0)


def test_the_shipped_autoencoder_keeps_colours_but_brown(shipped: colours.Colours) -> None:
    """Brown turns red where its latents are scaled by 1.5 and 2; red by itself is 12 of 255 too blue."""
    for name, (r, g, b) in BACKGROUNDS.items():
        assert shipped.decoded[name][1.0] == pytest.approx((r, g, b), abs=12 if name == "red" else 8)
    assert shipped.changed == {0.5: [], 0.8: [], 1.2: [], 1.5: ["brown"], 2.0: ["brown"]}
    assert shipped.kept == pytest.approx({0.1: 1.0, 0.3: 1.0, 0.5: 0.93}, abs=0.02)
    assert shipped.kept[0.3] >= 0.97
    assert shipped.misfit < 0.1


def test_the_table_names_the_colours_that_changed(shipped: colours.Colours) -> None:
    lines = table(shipped).splitlines()
    (brown,) = (line for line in lines if line.startswith("| brown |"))
    assert brown.count("**changed**") == sum("brown" in names for names in shipped.changed.values()) == 2
    assert any(line.startswith("| backgrounds of another hue, of 12 |") for line in lines)
    assert "1.00 at noise 0.3" in lines[-2]


@pytest.mark.parametrize(
    ("before", "after", "scale", "kept"),
    [
        ("red", (255, 0, 0), 2.0, True), ("red", (110, 79, 56), 1.5, False), ("red", (255, 177, 52), 0.5, False),
        ("orange", (217, 49, 54), 1.5, False), ("yellow", (255, 255, 40), 2.0, True),
        ("yellow", (246, 165, 70), 2.0, False), ("brown", (16, 16, 18), 2.0, False),
        ("brown", (120, 41, 0), 2.0, True),
        ("gray", (235, 159, 183), 2.0, False), ("gray", (150, 160, 178), 2.0, True),
        ("pink", (255, 208, 255), 2.0, True),
        ("pink", (150, 140, 150), 0.5, True), ("pink", (150, 140, 150), 1.5, False),
        ("white", (191, 203, 215), 0.5, True),
        ("black", (138, 51, 49), 0.5, False), ("cyan", (255, 255, 255), 2.0, False),
    ],
)  # fmt: skip
def test_what_counts_as_another_hue(before: str, after: tuple[int, int, int], scale: float, kept: bool) -> None:
    assert keeps_hue(BACKGROUNDS[before], after, scale) is kept


def test_the_command_measures_the_colours_of_emoji_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = SimpleNamespace(pixels=colours.flat_pictures([(214, 48, 49), (52, 104, 205)], 32))
    every = colours.object_colours("twemoji", "wide")
    assert len(every) > 250
    few = {name: every[name] for name in ("red apple", "frog face", "banana")}
    monkeypatch.setattr(checks, "draw_scenes", lambda *_: scenes)
    monkeypatch.setattr(checks, "object_colours", lambda *_: few)
    file = tmp_path / "colours.json"
    done = CliRunner().invoke(app, ["train-emoji", "colours", "emoji", "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "objects of another hue, of 3" in done.output
    figures = json.loads(file.read_text())
    assert figures["decoded"]["red apple"]["1.0"] == pytest.approx(every["red apple"], abs=20)
    assert figures["psnr"] > 20
    assert len(figures["linear"]) == 4


def test_without_the_pictures_the_rest_is_measured_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unavailable(*_: object) -> None:
        raise ConfigError("npm is needed")

    monkeypatch.setattr(checks, "draw_scenes", unavailable)
    monkeypatch.setattr(checks, "object_colours", lambda *_: {"flame": (240, 140, 30)})
    found = checks.colour_figures("emoji")
    assert found.psnr is None
    assert "flame" in found.decoded
    assert "PSNR is not measured: npm is needed" in capsys.readouterr().out


def test_a_folder_without_an_autoencoder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ConfigError, match="holds a UNet2DConditionModel"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text("[" * 300_000)
    with pytest.raises(ConfigError, match="nested"):
        load_autoencoder(tmp_path)


def test_the_weight_of_the_colour_term_relaxes_at_the_end() -> None:
    config = VaeConfig(colour_weight=2.0, colour_relax=0.5, colour_end=0.1)
    assert [config.colour_weight_at(f) for f in (0.0, 0.5)] == [2.0, 2.0]
    assert config.colour_weight_at(0.75) == pytest.approx(1.1)
    assert config.colour_weight_at(1.0) == pytest.approx(0.2)
    assert VaeConfig(colour_relax=0.0).colour_weight_at(1.0) == 1.0


@pytest.mark.parametrize("fitted", [False, True])
def test_the_colour_term_teaches_the_encoder_affine_colours(make_vae: Callable[[], Any], fitted: bool) -> None:
    torch.manual_seed(0)
    both = Autoencoding(make_vae(), fitted)
    assert sum(p.requires_grad for p in both.colours.parameters()) == (2 if fitted else 0)
    pixels = colours.flat_pictures(list(BACKGROUNDS.values()), 16)
    optimizer = torch.optim.Adam([p for p in both.parameters() if p.requires_grad], lr=1e-2)
    terms = []
    for _ in range(60):
        colour = both(pixels, torch.zeros(len(pixels), 4, 2, 2))[2]
        optimizer.zero_grad()
        colour.backward()
        optimizer.step()
        terms.append(colour.item())
    assert terms[-1] < 0.5 * terms[0]


@pytest.fixture
def make_vae() -> Callable[[], Any]:
    from diffusers import AutoencoderTiny

    return lambda: AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"colour_weight": -1.0},
        {"colour_relax": 2.0},
        {"colour_end": -0.1},
        {"crop": 12},
        {"size": 100},
        {"flat_batch": -1},
    ],
)
def test_settings_of_the_autoencoder_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        VaeConfig(**wrong).check()
