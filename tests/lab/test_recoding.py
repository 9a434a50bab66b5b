"""New latents for a trained autoencoder: what is learned, what it is measured by, and what stays as it was."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from helpers.small_models import make_run

from sun.common.settings import ConfigError
from sun.lab.emoji import recoding, ship
from sun.lab.emoji.colours import flat_pictures
from sun.lab.emoji.flat_colours import Extrapolation
from sun.lab.emoji.recoding import CUBE, ColourCube, Halves, RecodeConfig, Rest, recode
from sun.lab.emoji.vae import Autoencoding, Flat


@pytest.fixture
def vae() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )  # fmt: skip


def test_the_parts_together_are_the_autoencoder(vae: AutoencoderTiny) -> None:
    rest, pixels = Rest(vae), torch.rand(2, 3, 32, 32) * 2 - 1
    inputs = rest.inputs(pixels)
    assert torch.equal(rest.halves(inputs)[0], vae.encode(pixels).latents)
    restored = rest.upper(rest.features(inputs)) * 2 - 1
    torch.testing.assert_close(restored, vae.decode(vae.encode(pixels).latents).sample)


def test_the_metric_tells_what_an_error_does_to_the_picture(vae: AutoencoderTiny) -> None:
    """Against the error made, on average over small random errors of single features."""
    rest = Rest(vae)
    features = rest.features(rest.inputs(torch.rand(6, 3, 64, 64) * 2 - 1))
    root = rest.pixel_metric(features, rounds=60, rows=6)
    generator = torch.Generator().manual_seed(1)
    told, made = [], []
    for channel in range(features.shape[1]):
        wrong = torch.zeros_like(features)
        wrong[:, channel] = 1e-3 * torch.randn(wrong[:, channel].shape, generator=generator)
        told.append(float((wrong.permute(0, 2, 3, 1) @ root).square().sum(-1).mean()))
        made.append(float((2 * (rest.upper(features + wrong) - rest.upper(features))).square().mean()))
    ratio = torch.tensor(told) / torch.tensor(made)
    assert (ratio.log().abs() < 0.5).all(), ratio
    assert torch.corrcoef(torch.tensor([told, made]).log())[0, 1] > 0.9


def test_flat_colours_have_the_features_of_their_pictures(vae: AutoencoderTiny) -> None:
    rest = Rest(vae)
    cube = ColourCube(rest, torch.device("cpu"))
    step = 255 / (CUBE - 1)
    colours = [(0.0, 2 * step, 255.0), (step, 0.0, 5 * step), (0.0, 0.0, 0.0)]
    there = torch.tensor(colours) / 127.5 - 1
    found = rest.features(rest.inputs(flat_pictures(colours, 40)))[:, :, 2:3, 2:3]
    torch.testing.assert_close(cube.at(there), found)
    between = (there[:1] + cube_neighbour(there[:1])) / 2
    torch.testing.assert_close(cube.at(between), (cube.at(there[:1]) + cube.at(cube_neighbour(there[:1]))) / 2)
    assert torch.equal(cube.at(there[2:] * 3), cube.at(there[2:]))  # beyond black there is black


def cube_neighbour(colours: torch.Tensor) -> torch.Tensor:
    return colours + torch.tensor([2 / (CUBE - 1), 0.0, 0.0])


def test_latents_and_colours_move_alike() -> None:
    """A code that is linear in the colours is moved as they are; the first colours of a batch stay."""
    torch.manual_seed(0)
    colours, code = torch.rand(16, 3) * 2 - 1, torch.randn(3, 4)
    latents = (colours @ code)[..., None, None].expand(-1, -1, 2, 2)
    further = Extrapolation.draw(16, torch.device("cpu"))
    assert float(further.scale.min()) < 0.8
    assert float(further.scale.max()) > 1.2
    assert float(further.share.min()) < 0
    assert float(further.share.max()) > 1
    moved = (further.of(colours) @ code)[..., None, None].expand(-1, -1, 2, 2)
    torch.testing.assert_close(further.of(latents), moved)
    assert torch.equal(further.of(colours)[:2], colours[:2])


def test_the_decoder_learns_colours_whose_latents_are_moved(vae: AutoencoderTiny) -> None:
    """The flat term falls while the encoder stays, and every second colour is a named one."""
    torch.manual_seed(0)
    vae.encoder.requires_grad_(False)
    both, named = Autoencoding(vae), torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0]])
    pixels, noise = torch.zeros(1, 3, 16, 16), torch.zeros(1, 4, 2, 2)
    flat = Flat.draw(8, named, random.Random(0))
    assert all(any(torch.equal(colour, name) for name in named) for colour in flat.colours[1::2])
    assert not any(torch.equal(colour, name) for colour in flat.colours[::2] for name in named)
    assert float(both(pixels, noise)[3]) == 0.0
    optimizer = torch.optim.Adam(vae.decoder.parameters(), lr=3e-3)
    terms = []
    for _ in range(40):
        optimizer.zero_grad()
        moved = both(pixels, noise, flat)[3]
        moved.backward()
        optimizer.step()
        terms.append(moved.item())
    assert terms[-1] < 0.5 * terms[0]


def config_in(folder: Path, vae: AutoencoderTiny, **settings: Any) -> RecodeConfig:
    vae.save_pretrained(folder / "first")
    small: dict[str, Any] = {"scenes": 2, "size": 64, "crop": 48, "flat_colours": 8, "flat_batch": 4, **settings}
    return RecodeConfig(run=make_run(folder, "recoded", lr=1e-2), vae=str(folder / "first"), **small)


def test_only_what_makes_and_reads_the_latents_is_trained(packages: Path, tmp_path: Path, vae: AutoencoderTiny) -> None:
    written = AutoencoderTiny.from_pretrained(recode(config_in(tmp_path, vae)))
    old, new = Rest(vae), Rest(written)
    for before, after in ((old.trunk, new.trunk), (old.upper, new.upper)):
        assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    for part in ("tail", "head"):
        before, after = getattr(Halves(vae), part), getattr(Halves(written), part)
        assert all(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_what_an_earlier_run_computed_is_kept_and_a_damaged_file_made_again(
    packages: Path, tmp_path: Path, vae: AutoencoderTiny, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("SUN_CACHE", str(tmp_path / "cache"))
    computed: list[int] = []
    compute = recoding._computed
    monkeypatch.setattr(recoding, "_computed", lambda *given: (computed.append(1), compute(*given))[1])
    config = config_in(tmp_path, vae)
    for times in (1, 1):
        first = recoding.material_of(config, vae, Rest(vae), torch.device("cpu"))
        assert len(computed) == times
    (file,) = (tmp_path / "cache" / "recoding").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    again = recoding.material_of(config, vae, Rest(vae), torch.device("cpu"))
    assert len(computed) == 2
    assert "damaged. It is made again" in capsys.readouterr().out
    torch.testing.assert_close(again.features, first.features)


def test_a_decoder_ships_only_with_the_latents_it_was_trained_on(vae: AutoencoderTiny) -> None:
    """It may be trained on while the model is, from the same encoder; another encoder's would paint nonsense."""
    later, other = copy.deepcopy(vae), copy.deepcopy(vae)
    with torch.no_grad():
        next(later.decoder.parameters()).add_(1)
        next(other.encoder.parameters()).add_(1)
    assert ship.of_same_latents(later, vae, "here") is later
    with pytest.raises(ConfigError, match="here has another encoder"):
        ship.of_same_latents(other, vae, "here")
    later.register_to_config(scaling_factor=0.5)
    with pytest.raises(ConfigError, match=r"here scales latents by 0\.5, .* by 1\."):
        ship.of_same_latents(later, vae, "here")


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop": 40},
        {"crop": 50},
        {"size": 100},
        {"scenes": 0},
        {"colour_weight": -1.0},
        {"flat_weight": -1.0},
        {"latent_noise": -0.1},
    ],
)
def test_settings_outside_their_range_are_refused(tmp_path: Path, vae: AutoencoderTiny, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        recode(config_in(tmp_path, vae, **wrong))
    assert not (tmp_path / "recoded").exists()
