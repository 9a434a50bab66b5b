"""Do colours survive extrapolation? What an autoencoder makes of flat colours whose latents are scaled or noisy.

Classifier-free guidance extrapolates: it takes latents further along a line than any picture's. Where colour is a
linear function of the latents that saturates or fades a colour; where the latents of different colours lie behind one
another on one ray, it turns one colour into another. This is measured in seconds, before any long training.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.reading import ReadError, read_json
from ...common.settings import ConfigError
from ...shipped import EMOJI_DIFFUSION
from .main_colours import first_colour, known_emojis
from .scenes import BACKGROUNDS

RGB = tuple[int, int, int]
SCALES = (0.5, 0.8, 1.2, 1.5, 2.0)
NOISES = (0.1, 0.3, 0.5)
SIZE = 64  # pixels to a side of a flat picture
HELD_OUT = 48

_HUE_TOLERANCE = 15.0  # degrees: yellow and orange are 20 apart
_CHROMATIC, _FADED = 0.15, 0.10  # largest minus smallest channel, of 1: gray has 0.04, brown 0.26


@dataclass(frozen=True)
class Colours:
    """What an autoencoder does to flat colours.

    ``decoded``: RGB of every colour at every scale of its latents, 1 among them. ``changed``: names of the colours
    whose hue is another at a scale. ``kept``: share of pixels that keep their colour at a standard deviation of noise
    added to the latents, for the backgrounds. ``psnr``: dB on held-out scenes, where pictures were at hand.
    ``linear`` [4][3] and ``offset`` [3]: the affine map from latents to RGB in -1..1 that fits the flat colours best;
    ``misfit``: its root mean squared error.
    """

    decoded: dict[str, dict[float, RGB]]
    changed: dict[float, list[str]]
    kept: dict[float, float]
    linear: list[list[float]]
    offset: list[float]
    misfit: float
    psnr: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def load_autoencoder(where: str | Path) -> Any:
    """The autoencoder of a model's folder, or in a folder of its own; ``emoji`` is the shipped model.

    Raises ConfigError for a folder that holds none.
    """
    import diffusers

    folder = EMOJI_DIFFUSION if str(where) == "emoji" else Path(where)
    folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{where} is neither a model's folder nor that of an autoencoder (no config.json).")
    try:
        settings = read_json(folder / "config.json")
    except ReadError as error:
        raise ConfigError(str(error)) from error
    name = settings.get("_class_name", "") if isinstance(settings, dict) else ""
    if name not in ("AutoencoderTiny", "AutoencoderKL"):
        raise ConfigError(f"{where} holds a {name or 'model without a name'}, not an autoencoder.")
    vae = getattr(diffusers, name).from_pretrained(folder, torch_dtype=torch.float32)
    return vae.requires_grad_(False).eval()


def object_colours(style: str, emojis: str) -> dict[str, RGB]:
    """The colour that covers most of each emoji, by its name. Raises ConfigError for a style of unknown colours."""
    return {emoji.name: first_colour(emoji.code, style) for emoji in known_emojis(emojis, style)}


def measure(vae: Any, objects: Mapping[str, RGB] | None = None, held_out: Tensor | None = None) -> Colours:
    """Measure the backgrounds' colours and those of ``objects``; ``held_out`` [N, 3, H, W] in -1..1 for PSNR."""
    named = {**BACKGROUNDS, **(objects or {})}
    pixels = flat_pictures(list(named.values())).to(next(vae.parameters()).device)
    latents = encode(vae, pixels)
    decoded: dict[str, dict[float, RGB]] = {name: {} for name in named}
    changed: dict[float, list[str]] = {}
    for scale in sorted((*SCALES, 1.0)):
        colours = mean_colours(decode(vae, latents * scale))
        for name, colour in zip(named, colours, strict=True):
            decoded[name][scale] = colour
        if scale != 1.0:
            changed[scale] = [n for n, c in zip(named, colours, strict=True) if not keeps_hue(named[n], c, scale)]
    linear, offset, misfit = fit_colours(latents, pixels)
    backgrounds = latents[: len(BACKGROUNDS)]
    return Colours(
        decoded,
        changed,
        {noise: share_kept(vae, backgrounds, noise) for noise in NOISES},
        linear,
        offset,
        misfit,
        None if held_out is None else psnr(vae, held_out),
    )


def flat_pictures(colours: Sequence[RGB], size: int = SIZE) -> Tensor:
    """[N, 3, size, size] in -1..1, one colour each."""
    return (torch.tensor(colours) / 127.5 - 1).view(-1, 3, 1, 1).expand(-1, -1, size, size).contiguous()


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Latents [N, 4, h, w] of pictures in -1..1: of a model with a posterior its mean."""
    encoded = vae.encode(pixels)
    latents: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return latents.float()


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in -1..1."""
    restored: Tensor = vae.decode(latents).sample
    return restored.float().clamp(-1, 1)


def mean_colours(pixels: Tensor) -> list[RGB]:
    """The mean colour of every picture, without its border: the outermost latents see the edge."""
    inner = pixels[..., 8:-8, 8:-8] if pixels.shape[-1] > 24 else pixels
    levels = ((inner.mean((2, 3)) + 1) * 127.5).round().clamp(0, 255).int().tolist()
    return [(r, g, b) for r, g, b in levels]


def keeps_hue(before: RGB, after: RGB, scale: float) -> bool:
    """Whether ``after``, drawn from the latents of ``before`` times ``scale``, still has its hue.

    It may be as saturated as it likes, and below scale 1 as faded. Its hue may lie up to 15 degrees beside those from
    its own to the one that an exactly linear colour would have, which moves where channels reach their end.
    """
    linear = tuple(round(min(1.0, max(-1.0, (c / 127.5 - 1) * scale)) * 127.5 + 127.5) for c in before)
    if chroma(before) < _CHROMATIC:
        return chroma(after) < max(_CHROMATIC, chroma(linear) + 0.05)
    if chroma(after) < _FADED:
        return scale < 1
    own, goal, now = hue(before), hue(linear), hue(after)
    span = _turn(own, goal)
    return min(_beside(now, own, span), abs(_turn(own, now)), abs(_turn(goal, now))) <= _HUE_TOLERANCE


def chroma(colour: Sequence[int]) -> float:
    """Largest minus smallest channel, 0 to 1."""
    return (max(colour) - min(colour)) / 255


def hue(colour: Sequence[int]) -> float:
    """Degrees, 0 to 360; 0 is red."""
    return colorsys.rgb_to_hsv(*(c / 255 for c in colour))[0] * 360


def _turn(a: float, b: float) -> float:
    """From hue a to hue b the short way, -180 to 180 degrees."""
    return (b - a + 180) % 360 - 180


def _beside(now: float, own: float, span: float) -> float:
    """0 when ``now`` lies on the way from ``own`` over ``span``, else far."""
    way = _turn(own, now)
    return 0.0 if 0 <= way * (1 if span >= 0 else -1) <= abs(span) else 360.0


def nearest_names(pixels: Tensor) -> Tensor:
    """Number [N, H, W] of the background that every pixel of [N, 3, H, W] is nearest to."""
    known = flat_pictures(list(BACKGROUNDS.values()), 1).flatten(1)
    return torch.cdist(pixels.permute(0, 2, 3, 1).flatten(1, 2), known).argmin(-1).view(len(pixels), *pixels.shape[2:])


def share_kept(vae: Any, latents: Tensor, noise: float, seed: int = 0) -> float:
    """Share of pixels that are nearest to their own background when noise of a standard deviation is added."""
    generator = torch.Generator().manual_seed(seed)
    noisy = latents + noise * torch.randn(latents.shape, generator=generator).to(latents)
    right = nearest_names(decode(vae, noisy).cpu()) == torch.arange(len(latents)).view(-1, 1, 1)
    return float(right.float().mean())


def fit_colours(latents: Tensor, pixels: Tensor) -> tuple[list[list[float]], list[float], float]:
    """(linear [4][3], offset [3], root mean squared error) of the affine map from latents to mean colours in -1..1."""
    scale = pixels.shape[-1] // latents.shape[-1]
    z = latents.cpu().permute(0, 2, 3, 1).flatten(0, 2)
    rgb = F.avg_pool2d(pixels.cpu(), scale).permute(0, 2, 3, 1).flatten(0, 2)
    inputs = torch.cat([z, torch.ones(len(z), 1)], 1).double()
    # lstsq would depend on the rank: flat colours can lie in fewer dimensions than the latents have
    solution = torch.linalg.pinv(inputs, rtol=1e-4) @ rgb.double()
    misfit = float((inputs @ solution - rgb).square().mean().sqrt())
    rounded = [[round(v, 4) for v in row] for row in solution.tolist()]
    return rounded[:-1], rounded[-1], round(misfit, 4)


def psnr(vae: Any, pixels: Tensor) -> float:
    """Mean peak signal-to-noise ratio (dB) of restored pictures [N, 3, H, W] in -1..1."""
    errors = [((decode(vae, encode(vae, part)) - part) / 2).square().flatten(1).mean(1) for part in pixels.split(8)]
    return float((-10 * torch.cat(errors).log10()).mean())


def in_a_line(found: Colours) -> str:
    """What :func:`table` says, for the terminal while training."""
    changed = ", ".join(f"{len(names)} at x {scale:g}" for scale, names in found.changed.items())
    kept = ", ".join(f"{share:.2f} at {noise:g}" for noise, share in found.kept.items())
    return f"flat colours of another hue: {changed}; pixels that keep their colour with noise: {kept}"


def table(found: Colours) -> str:
    """Markdown: each background at every scale, then the counts over all colours, noise and PSNR."""
    scales = sorted((*SCALES, 1.0))
    names = [name for name in found.decoded if name not in BACKGROUNDS]
    rows = [["flat colour", *(f"x {scale:g}" for scale in scales)], ["---"] * (len(scales) + 1)]
    for name in BACKGROUNDS:
        changed = {scale for scale, others in found.changed.items() if name in others}
        rows.append([name, *(_hex(found.decoded[name][s]) + " **changed**" * (s in changed) for s in scales)])
    for title, group in (("backgrounds of another hue", list(BACKGROUNDS)), ("objects of another hue", names)):
        if group:
            counts = (str(len({*found.changed[s]} & {*group})) if s in found.changed else "" for s in scales)
            rows.append([f"{title}, of {len(group)}", *counts])
    kept = ", ".join(f"{share:.2f} at noise {noise:g}" for noise, share in found.kept.items())
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", f"Share of pixels that keep their colour when noise is added to the latents: {kept}."]
    lines.append(f"An affine map of the latents gives the flat colours within {found.misfit:.3f} (of 2).")
    if found.psnr is not None:
        lines.append(f"PSNR on {HELD_OUT} held-out scenes: {found.psnr:.1f} dB.")
    return "\n".join(lines) + "\n"


def _hex(colour: RGB) -> str:
    return "#" + "".join(f"{level:02x}" for level in colour)
