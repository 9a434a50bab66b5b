"""Give a trained autoencoder other latents, whose colours survive guidance, without training it again.

All that is specific about the latents of an AutoencoderTiny are the encoder's last blocks and the decoder's first ones,
which work at an eighth of the picture's size. They learn anew what the old ones together gave the rest of the decoder:
a step costs about a thirtieth of one through whole pictures. Around them nothing changes; what the rest of the decoder
could still gain, ``sun train-emoji vae`` with ``freeze_encoder`` teaches it afterwards.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...common.cache import cache_dir
from ...common.settings import ConfigError
from ...pipelines.loading import load_part
from ...training.config import RunConfig
from ...training.data.cache import hash_weights, read_tensors, write_tensors
from ...training.run import TrainingRun, start_run
from .colours import flat_pictures, in_a_line, measure
from .flat_colours import Extrapolation, colours_of_all_kinds, named_colours
from .latents import scenes_in_style
from .runs import emoji_run
from .scenes import render_scene
from .sources import check_style, load_metadata
from .vae import ColourMap, ColourTerm, far_from_standard, to_tensor

BORDER = 1  # latents at a crop's border saw other neighbours than those of the whole picture
CUBE = 9  # flat colours to a side of the cube between which the features of any colour are interpolated
_FLAT = 40  # pixels to a side of those


@dataclass
class RecodeConfig(ColourTerm):
    """Crops of ``crop`` pixels are cut from ``scenes`` scenes of ``size`` pixels."""

    run: RunConfig = field(default_factory=lambda: emoji_run("runs/emoji-recoded", 5000, 2e-3, weight_decay=0.0))
    vae: str = "runs/emoji-vae/vae"  # a diffusers folder of the autoencoder to begin with
    style: str = "twemoji"
    scenes: int = 1536
    size: int = 128
    crop: int = 64
    colour_weight: float = 1.5
    colour_relax: float = 0.4
    colour_end: float = 0.3
    latent_noise: float = 0.27  # the decoder's first blocks see latents with noise of up to this standard deviation
    pixel_weight: float = 20.0  # of the error in the picture that wrong features make
    feature_weight: float = 0.2  # of the error of the features themselves, each in units of its own spread
    latent_weight: float = 0.02
    # A batch holds `flat_batch` flat colours, every second one a background's or an object's own, the others among
    # `flat_colours` of all kinds. Half of them are scaled, half extrapolated from one to another, as guidance does, and
    # must become the colours that a linear code would give.
    flat_colours: int = 512
    flat_batch: int = 24
    flat_weight: float = 8.0

    def check(self) -> None:
        """Raise ConfigError for an unknown style and for numbers outside their range."""
        check_style(self.style)
        self.check_colours()
        if self.size % 8:
            raise ConfigError(f"size is a multiple of 8 pixels, not {self.size}.")
        if self.crop % 8 or not 48 <= self.crop <= self.size:
            raise ConfigError(f"crop is a multiple of 8 pixels from 48 to size ({self.size}), not {self.crop}.")
        if min(self.scenes, self.flat_colours, self.flat_batch) < 2:
            raise ConfigError("scenes, flat_colours and flat_batch are 2 or above.")
        weights = self.pixel_weight, self.feature_weight, self.latent_weight, self.flat_weight
        if min(*weights, self.latent_noise) < 0:
            raise ConfigError(
                "pixel_weight, feature_weight, latent_weight, flat_weight and latent_noise are 0 or above."
            )


class Halves(nn.Module):
    """The parts of an AutoencoderTiny on both sides of the latents that work at the latents' size."""

    def __init__(self, vae: AutoencoderTiny):
        super().__init__()
        down, up = _last_stride(vae.encoder.layers), _first_upsampling(vae.decoder.layers)
        self.tail = nn.Sequential(*vae.encoder.layers[down + 1 :])
        self.head = nn.Sequential(*vae.decoder.layers[:up])

    def forward(self, inputs: Tensor, move: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """What the encoder has at the latents' size, [B, 64, h, w] -> latents [B, 4, h, w], and what the rest of the
        decoder gets of them, [B, 64, h, w]; ``move`` changes them in between."""
        latents = self.tail(inputs)
        seen = move(latents) if move else latents
        return latents, self.head(torch.tanh(seen / 3) * 3)


def _last_stride(layers: nn.Sequential) -> int:
    return max(i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d) and layer.stride[0] == 2)


def _first_upsampling(layers: nn.Sequential) -> int:
    return next(i for i, layer in enumerate(layers) if isinstance(layer, nn.Upsample))


class Rest:
    """The parts of ``vae`` that stay, and what its own halves gave them."""

    def __init__(self, vae: AutoencoderTiny):
        vae = copy.deepcopy(vae).requires_grad_(False)
        self.halves = Halves(vae)
        self.trunk = vae.encoder.layers[: _last_stride(vae.encoder.layers) + 1]
        self.upper = vae.decoder.layers[_first_upsampling(vae.decoder.layers) :]

    def inputs(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in -1..1 -> [B, 64, H/8, W/8] for the tail."""
        inputs: Tensor = self.trunk(pixels.add(1).div(2))
        return inputs

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Tensor:
        """What the old halves make of inputs [B, 64, h, w]."""
        features: Tensor = self.halves(inputs)[1]
        return features

    def pixel_metric(self, features: Tensor, rounds: int = 24, rows: int = 8) -> Tensor:
        """A root R [64, 64] of the metric of features: |e R|^2 is about the squared error of a pixel's channel, of 2,
        that an error e of the features makes at their place; what errors at two places make together is left out.

        Estimated from ``rounds`` random directions in ``rows`` pictures each.
        """
        width, quarter = features.shape[1], features.shape[-1] // 4
        middle = slice(quarter, features.shape[-1] - quarter)
        metric = torch.zeros(width, width, device=features.device)
        for _ in range(rounds):
            some = features[torch.randint(len(features), (rows,)), :, middle, middle].clone().requires_grad_(True)
            out = 2 * self.upper(some)
            direction = torch.randint(0, 2, out.shape, device=out.device) * 2.0 - 1
            slopes = torch.autograd.grad((out * direction).sum(), some)[0].permute(0, 2, 3, 1).flatten(0, 2)
            metric += slopes.T @ slopes / len(slopes) / rounds
        metric /= out[0].numel() / some[0, 0].numel()
        floor = 1e-6 * metric.diagonal().mean() * torch.eye(width, device=metric.device)
        return torch.linalg.cholesky(metric + floor)


class ColourCube:
    """The features of flat pictures of any colour, interpolated between those of ``CUBE`` x ``CUBE`` x ``CUBE``."""

    @torch.no_grad()
    def __init__(self, rest: Rest, device: torch.device):
        axis = torch.linspace(0, 255, CUBE)
        colours = torch.cartesian_prod(axis, axis, axis).tolist()
        middle = _FLAT // 16
        found = [
            rest.features(rest.inputs(flat_pictures(colours[i : i + 64], _FLAT).to(device)))[:, :, middle, middle]
            for i in range(0, len(colours), 64)
        ]
        self.features = torch.cat(found).T.view(1, -1, CUBE, CUBE, CUBE)  # [1, 64, red, green, blue]

    def at(self, colours: Tensor) -> Tensor:
        """Colours [N, 3] in -1..1, those outside at its end -> features [N, 64, 1, 1]."""
        where = colours.clamp(-1, 1).flip(1).view(1, -1, 1, 1, 3)  # grid_sample wants the last axis first
        return F.grid_sample(self.features, where, align_corners=True)[0, :, :, 0, 0].T[..., None, None]


class Material(NamedTuple):
    """What the halves learn from: of scenes the tail's ``inputs``, the ``features`` wanted and the ``colours`` of the
    small pictures; of flat pictures the tail's ``flat_inputs`` and their ``flat_colours`` [N, 3], of which the first
    ``named`` are those of backgrounds and objects."""

    inputs: Tensor
    features: Tensor
    colours: Tensor
    flat_inputs: Tensor
    flat_colours: Tensor
    named: int


def material_of(config: RecodeConfig, vae: AutoencoderTiny, rest: Rest, device: torch.device) -> Material:
    """Computed from the run's seed once, and kept under :func:`cache_dir` for a run that goes on."""
    known = json.dumps([config.style, config.scenes, config.size, config.crop, config.flat_colours, config.run.seed])
    made_from = hashlib.sha256(known.encode())
    hash_weights(made_from, vae)
    file = cache_dir() / "recoding" / f"{made_from.hexdigest()[:16]}.safetensors"
    named = len(named_colours(config.style))
    parts = {*Material._fields} - {"named"}
    found = read_tensors(file, lambda kept: kept.keys() == parts)
    if found is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        found = _computed(config, rest, device)
        write_tensors(file, found)
    return Material(**{name: part.to(device) for name, part in found.items()}, named=named)


@torch.no_grad()
def _computed(config: RecodeConfig, rest: Rest, device: torch.device) -> dict[str, Tensor]:
    scenes, drawings = scenes_in_style(load_metadata("wide"), config.style, config.scenes, config.run.seed, config.size)
    inputs, features, colours = [], [], []
    for start in tqdm(range(0, config.scenes, 32), desc="scenes"):
        some = scenes[start : start + 32]
        pixels = to_tensor([render_scene(scene, drawings, config.size) for scene in some]).to(device)
        inputs.append(rest.inputs(pixels))
        features.append(rest.features(inputs[-1]))
        colours.append(F.avg_pool2d(pixels, 8))
    flat = torch.cat([named_colours(config.style), colours_of_all_kinds(config.flat_colours, config.run.seed)])
    flat_inputs = [
        rest.inputs(part.to(device).view(-1, 3, 1, 1).expand(-1, -1, config.crop, config.crop).contiguous())
        for part in tqdm(flat.split(32), desc="flat colours")
    ]
    found = {"inputs": inputs, "features": features, "colours": colours, "flat_inputs": flat_inputs}
    return {name: torch.cat(parts).cpu().contiguous() for name, parts in found.items()} | {"flat_colours": flat}


class Recoding:
    """The losses of one run."""

    def __init__(self, config: RecodeConfig, rest: Rest, material: Material):
        self.config, self.material = config, material
        self.colour_map = ColourMap(fitted=False).to(material.inputs.device)
        self.cube = ColourCube(rest, material.inputs.device)
        self.metric = rest.pixel_metric(material.features)
        self.spread = material.features.std((0, 2, 3)).view(1, -1, 1, 1) + 1e-3

    def losses(self, halves: nn.Module, colour_weight: float, rng: random.Random) -> dict[str, Tensor]:
        """``loss`` and the parts it is made of, for one batch."""
        config, have = self.config, self.material
        side, whole = config.crop // 8, have.inputs.shape[-1]
        y, x = (rng.randint(0, whole - side) for _ in range(2))
        rows = torch.tensor([rng.randrange(len(have.inputs)) for _ in range(config.run.batch_size)])
        flat = torch.tensor(
            [
                rng.randrange(have.named) if i % 2 else rng.randrange(have.named, len(have.flat_inputs))
                for i in range(config.flat_batch)
            ]
        )
        inputs, wanted, colours = (
            part[rows, :, y : y + side, x : x + side] for part in (have.inputs, have.features, have.colours)
        )
        further = Extrapolation.draw(len(flat), have.inputs.device)

        def move(latents: Tensor) -> Tensor:
            seen = torch.cat([latents[: len(rows)], further.of(latents[len(rows) :])])
            noise = config.latent_noise * torch.rand(len(seen), 1, 1, 1, device=seen.device)
            return seen + noise * torch.randn_like(seen)

        latents, features = halves(torch.cat([inputs, have.flat_inputs[flat]]), move)
        scenes, flats = latents.split([len(rows), len(flat)])
        out, flat_out = features.split([len(rows), len(flat)])
        goal = self.cube.at(further.of(have.flat_colours[flat]))
        pixels, own = self._errors(out - wanted, BORDER)
        flat_pixels, flat_own = self._errors(flat_out - goal, 2)
        named = have.flat_colours[flat][..., None, None].expand(-1, -1, side - 2 * BORDER, side - 2 * BORDER)
        colour = F.mse_loss(self.colour_map(scenes), colours)
        colour = colour + 0.5 * F.mse_loss(_inner(self.colour_map(flats), BORDER), named)
        loss = (
            config.pixel_weight * pixels
            + config.feature_weight * (own + 0.2 * flat_own)
            + config.flat_weight * flat_pixels
            + colour_weight * colour
            + config.latent_weight * far_from_standard(scenes)
        )
        return {"loss": loss, "pixels": pixels, "features": own, "flat": flat_pixels, "colour": colour}

    def _errors(self, wrong: Tensor, border: int) -> tuple[Tensor, Tensor]:
        """Of differences of features: their error in the picture, and in units of each feature's spread."""
        inner = _inner(wrong, border)
        return (inner.permute(0, 2, 3, 1) @ self.metric).square().sum(-1).mean(), (inner / self.spread).square().mean()


def _inner(values: Tensor, border: int) -> Tensor:
    return values[..., border:-border, border:-border]


def recode(config: RecodeConfig) -> Path:
    """Train, and write ``<output>/vae`` (diffusers folder): the autoencoder with the new halves. Returns the folder."""
    config.check()
    vae = load_part(AutoencoderTiny, Path(config.vae), torch.float32).requires_grad_(False)
    rest, halves = Rest(vae), Halves(vae).requires_grad_(True)
    run = start_run(config, {"halves": halves})
    device = run.accelerator.device
    for part in (vae, rest.trunk, rest.upper, rest.halves):
        part.to(device)
    learning = Recoding(config, rest, material_of(config, vae, rest, device))
    for _ in run.steps():
        found = learning.losses(run.modules["halves"], config.colour_weight_at(run.fraction), run.rng)
        run.update(found.pop("loss"), **found)
        if run.time_to_sample():
            _tell(run, vae)
    _tell(run, vae)
    with run.averaged(), run.writing("the autoencoder"):
        if run.accelerator.is_main_process:
            vae.save_pretrained(run.folder / "vae")
    return run.folder / "vae"


def _tell(run: TrainingRun, vae: AutoencoderTiny) -> None:
    if run.accelerator.is_main_process:
        with run.averaged():
            run.say(in_a_line(measure(vae)))
