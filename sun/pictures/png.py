"""Pictures as files: PNG with the text that reproduces them, and labelled grids of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from ..common.atomic import write_atomically
from ..user_pictures import open_picture

if TYPE_CHECKING:
    import torch


def save_png(image: Image.Image, path: str | Path, text: Mapping[str, str] | None = None) -> Path:
    """Write ``image`` as a PNG file: see :func:`write_png`. Raises OSError."""
    return write_atomically(path, lambda handle: write_png(image, handle, text))


def write_png(image: Image.Image, handle: IO[bytes], text: Mapping[str, str] | None = None) -> None:
    """Write ``image`` as PNG with ``text`` as tEXt chunks (iTXt where a value is not Latin-1)."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    image.save(handle, "PNG", pnginfo=info)


def read_png_text(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG. Raises PictureError when the file is missing or no PNG."""
    picture = open_picture(path, formats=("PNG",))
    return {str(k): str(v) for k, v in picture.info.items() if isinstance(v, str)}


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in -1..1 -> RGB pictures."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in array]


def grid(
    images: Sequence[Image.Image],
    columns: int,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    scale: int = 1,
    gap: int = 4,
) -> Image.Image:
    """Pictures of one size in rows of ``columns``, with a title above each row and above each column where given.

    ``scale`` enlarges small pictures by a whole number without smoothing, so that labels fit beside them.
    """
    width, height = (side * scale for side in images[0].size)
    font = ImageFont.load_default(size=max(12, min(28, width // 14)))
    line = int(font.getbbox("Ag")[3] * 1.4)
    heads = [_wrap(text, font, width) for text in column_labels]
    head = max((len(lines) for lines in heads), default=0) * line
    title = line if row_labels else 0
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (gap + columns * (width + gap), gap + head + rows * (title + height + gap)), "white")
    draw = ImageDraw.Draw(page)
    for column, lines in enumerate(heads):
        for i, text in enumerate(lines):
            draw.text((gap + column * (width + gap), gap + i * line), text, "#555555", font)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        x, y = gap + column * (width + gap), gap + head + row * (title + height + gap)
        if column == 0 and row < len(row_labels):
            draw.text((x, y), row_labels[row], "black", font)
        page.paste(image.resize((width, height), Image.Resampling.NEAREST) if scale > 1 else image, (x, y + title))
    return page


def save_grid(images: Sequence[Image.Image], columns: int, path: str | Path, row_labels: Sequence[str] = ()) -> Path:
    """Write :func:`grid` as a PNG."""
    return save_png(grid(images, columns, row_labels), path)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """``text`` in lines no wider than ``width`` pixels; a single word may stand out."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
