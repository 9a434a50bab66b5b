"""The colours of emoji: what each is mainly made of, and whether a picture shows it in those.

``main_colours.json`` holds, for every emoji of the wide vocabulary and every style that judges need, the few colours
that make up most of its artwork as ``rrggbb:percent``. It is derived from the artwork by :func:`derive_main_colours`,
so that judging a picture needs no artwork.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...common.settings import ConfigError
from .scenes import BACKGROUNDS
from .sources import Emoji, load_metadata, load_pictures

TABLE_FILE = Path(__file__).with_name("main_colours.json")
TABLE_STYLES = ("twemoji", "openmoji", "fluent", "google")

NEAR = 20.0  # colours this far apart in CIELAB are the same to the eye of a picture's reader
DISTINCT = 28.0  # an emoji's colour nearer than this to the background's cannot be told from it
HUE = math.radians(28)  # two hues this far apart have the same name
GRAY = 18.0  # chroma below which a colour has no hue
RING = 0.06  # width of the frame that shows the background, of the picture's side
LEAST_OBJECT = 0.03  # share of a picture that an object covers at least


def to_lab(rgb: Tensor) -> Tensor:
    """CIELAB (D65) of sRGB colours [..., 3] in 0..1."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    to_xyz = rgb.new_tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = linear @ to_xyz.T / rgb.new_tensor([0.95047, 1.0, 1.08883])
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def pixels_to_lab(pixels: Tensor) -> Tensor:
    """CIELAB [B, H, W, 3] of pixels [B, 3, H, W] in -1..1."""
    return to_lab(((pixels.float().cpu() + 1) / 2).clamp(0, 1).movedim(1, -1))


@dataclass(frozen=True)
class Palette:
    """Main colours in CIELAB [K, 3] and the share [K] of an emoji's area that each has."""

    colours: Tensor
    shares: Tensor

    def beside(self, tone: Tensor, least: float = DISTINCT) -> tuple[Palette, float]:
        """The colours that can be told from a background's ``tone`` [3], their shares summing to 1; and the share
        of the whole that they are."""
        kept = torch.cdist(self.colours, tone[None])[:, 0] > least
        share = float(self.shares[kept].sum() / self.shares.sum())
        return Palette(self.colours[kept], self.shares[kept] / self.shares[kept].sum()), share


def derive_main_colours(picture: Image.Image, size: int = 64, near: float = 14.0, least: float = 0.04) -> str:
    """The main colours of an RGBA picture as ``rrggbb:percent ...``, the largest first.

    The colour that most opaque pixels are ``near`` (CIELAB) is taken, then the same of what is left; each pixel then
    belongs to the nearest. Colours of less than ``least`` of the area are left out.
    """
    small = torch.frombuffer(bytearray(picture.convert("RGBA").resize((size, size)).tobytes()), dtype=torch.uint8)
    rgba = small.view(-1, 4).float() / 255
    rgb = rgba[rgba[:, 3] >= 0.5][:, :3]
    if not len(rgb):
        return ""
    lab = to_lab(rgb)
    centres: list[Tensor] = []
    left = torch.ones(len(lab), dtype=torch.bool)
    while left.float().mean() > 0.02 and len(centres) < 12:
        rest = lab[left]
        around = torch.cdist(rest[:: max(1, len(rest) // 256)], rest) < near
        centres.append(rest[around[around.sum(1).argmax()]].median(0).values)
        left &= torch.cdist(lab, centres[-1][None])[:, 0] >= near
    nearest = torch.cdist(lab, torch.stack(centres)).argmin(1)
    parts = []
    for k in range(len(centres)):
        share = float((nearest == k).float().mean())
        if share >= least:
            red, green, blue = (round(255 * float(v)) for v in rgb[nearest == k].median(0).values)
            parts.append((share, f"{red:02x}{green:02x}{blue:02x}:{round(100 * share)}"))
    return " ".join(text for _, text in sorted(parts, key=lambda part: -part[0]))


def write_table(path: Path = TABLE_FILE, styles: Sequence[str] = TABLE_STYLES, vocabulary: str = "wide") -> Path:
    """Derive the table anew from the artwork, which npm fetches. Raises ConfigError."""
    emojis = load_metadata(vocabulary)
    rows: dict[str, dict[str, str]] = {}
    for style in styles:
        for code, picture in load_pictures(style, emojis, 64).items():
            rows.setdefault(code, {})[style] = derive_main_colours(picture)
    lines = (f"  {json.dumps(emoji.code)}: {json.dumps(rows[emoji.code])}" for emoji in emojis if emoji.code in rows)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return path


@cache
def _table(path: Path) -> dict[str, dict[str, str]]:
    table: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    return table


def known_emojis(vocabulary: str, style: str) -> list[Emoji]:
    """Those of a vocabulary whose colours in ``style`` are known. Raises ConfigError if none is."""
    found = [emoji for emoji in load_metadata(vocabulary) if style in _table(TABLE_FILE).get(emoji.code, {})]
    if not found:
        raise ConfigError(
            f"the colours of emoji in the style {style!r} are not known; {TABLE_FILE.name} has "
            f"{', '.join(TABLE_STYLES)}."
        )
    return found


def main_colours(code: str, style: str) -> Palette:
    """The main colours of an emoji in a style. Raises KeyError for one that the table lacks."""
    return _palette(_table(TABLE_FILE)[code][style])


@cache
def _palette(text: str) -> Palette:
    parts = [part.split(":") for part in text.split()]
    rgb = torch.tensor([[int(text[i : i + 2], 16) for i in (0, 2, 4)] for text, _ in parts]) / 255
    return Palette(to_lab(rgb), torch.tensor([float(share) for _, share in parts]) / 100)


def first_colour(code: str, style: str) -> tuple[int, int, int]:
    """RGB of the colour that covers most of an emoji in a style. Raises KeyError for one that the table lacks."""
    red, green, blue = bytes.fromhex(_table(TABLE_FILE)[code][style].partition(":")[0])
    return red, green, blue


@cache
def background_tones() -> Tensor:
    """[12, 3]: the backgrounds' colours in CIELAB, in their order."""
    return to_lab(torch.tensor(list(BACKGROUNDS.values())) / 255)


def shown_background(lab: Tensor) -> tuple[str, float, Tensor]:
    """What a picture [H, W, 3] (CIELAB) has around its object: the background's name, the share of the frame that
    shows it, and its tone [3] there."""
    height, width = lab.shape[:2]
    frame = torch.ones(height, width, dtype=torch.bool)
    wide = max(2, round(RING * min(height, width)))
    frame[wide:-wide, wide:-wide] = False
    around = lab[frame]
    nearest = torch.cdist(around, background_tones()).argmin(1)
    counts = torch.bincount(nearest, minlength=len(BACKGROUNDS))
    most = int(counts.argmax())
    return list(BACKGROUNDS)[most], float(counts[most]) / len(around), around[nearest == most].median(0).values


def own_colour_share(lab: Tensor, tone: Tensor, palette: Palette) -> float:
    """How much of the object in a picture [H, W, 3] (CIELAB) on a background of ``tone`` [3] is as it should be.

    1 where the object's pixels are the palette's colours in the palette's shares, 0 where none is: the intersection
    of the histogram over these colours with the palette's own. Not a number where the background has most of the
    emoji's colours, so that nothing can be said.
    """
    seen, distinct = palette.beside(tone)
    if distinct < 0.5:
        return math.nan
    points = lab.reshape(-1, 3)
    points = points[torch.cdist(points, tone[None])[:, 0] > NEAR]
    if len(points) < LEAST_OBJECT * lab.shape[0] * lab.shape[1]:
        return 0.0
    matching = _same_colour(points, seen.colours)
    nearest = torch.cdist(points, seen.colours).masked_fill(~matching, torch.inf).argmin(1)
    counts = torch.bincount(nearest[matching.any(1)], minlength=len(seen.shares)) / len(points)
    return float(torch.minimum(counts, seen.shares).sum())


def _same_colour(points: Tensor, colours: Tensor) -> Tensor:
    """[N, K]: whether points [N, 3] have the hue of colours [K, 3], or like them none, at about their lightness."""
    chroma, wanted = points[:, None, 1:].norm(dim=-1), colours[None, :, 1:].norm(dim=-1)
    hues = torch.atan2(points[:, None, 2], points[:, None, 1]) - torch.atan2(colours[None, :, 2], colours[None, :, 1])
    turned = ((hues + math.pi) % (2 * math.pi) - math.pi).abs()
    lighter = (points[:, None, 0] - colours[None, :, 0]).abs()
    coloured = (wanted >= GRAY) & (chroma >= 12) & (turned <= HUE) & (lighter <= 40)
    gray = (wanted < GRAY) & (chroma < 22) & (lighter <= 28)
    return coloured | gray | (torch.cdist(points, colours) <= NEAR)
