"""A picture that somebody hands over, read the same way everywhere: command line, web UIs, training.

Upright as its EXIF says, on white where it is transparent, 16 bits scaled to 8, the first of several frames; of a few
named formats and a bounded size. Needs Pillow and numpy alone, so that web UIs can import it (Pillow 9.5 there).
"""

from __future__ import annotations

import io
import os
from typing import BinaryIO

import numpy as np
from PIL import Image

from .common.reading import ReadError, open_regular, printable

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is opened, whatever a file is called. Pillow knows 40 more; EPS among them starts a program."""
MAX_PIXELS = 89_478_485
"""Pillow's own bound, beyond which it warns of a bomb: 270 MB in RGB."""
MAX_BYTES = 2**30

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HOLD_ORIENTATION = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
_NEARLY_WHITE = 250


class PictureError(ValueError):
    """A picture that cannot be used; the message says which, why and what to do."""


def read_picture(source: str | os.PathLike[str] | bytes, name: str = "") -> Image.Image:
    """The RGB picture in a file (or in bytes), as :func:`flatten` makes it. ``name`` is what errors call it.

    Raises PictureError for what is no such picture, and for one of which nothing is left on white.
    """
    name = name or _called(source)
    picture = open_picture(source, name)
    flat = flatten(picture, name)
    seen_through = is_transparent(picture) and _rgba(picture).getchannel("A").getextrema() != (255, 255)
    if seen_through and flat.convert("L").getextrema()[0] == 255:
        raise PictureError(
            f"{name} shows nothing but white where it is not transparent, and SUN reads pictures on white. "
            "Save it on a background of its own; a mask or a control picture in black and white."
        )
    return flat


def read_mask(source: str | os.PathLike[str] | bytes, name: str = "") -> Image.Image:
    """The mask in a file (or in bytes), mode L, white where a picture is repainted: see :func:`flatten_mask`."""
    name = name or _called(source)
    return flatten_mask(open_picture(source, name), name)


def open_picture(
    source: str | os.PathLike[str] | bytes, name: str = "", formats: tuple[str, ...] = FORMATS
) -> Image.Image:
    """A picture as its file has it, read completely: its own mode, not yet upright. Raises PictureError."""
    name = name or _called(source)
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source, MAX_BYTES) as handle:
            return _load(handle, name, formats)
    except PictureError:
        raise
    except FileNotFoundError:
        raise PictureError(f"the picture {name} does not exist. Check the path.") from None
    except ReadError as error:
        raise PictureError(str(error)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(f"{name} has too many pixels; at most {MAX_PIXELS:,} are read. Make it smaller.") from error
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise PictureError(
            f"{name} is not a picture that can be read ({_reason(error)}). Give a {', '.join(formats)}."
        ) from error


def flatten(picture: Image.Image, name: str = "the picture") -> Image.Image:
    """``picture`` in RGB: upright, 8 bits a channel, on white where it is transparent. Raises PictureError."""
    return on_white(upright(picture, name))


def flatten_mask(picture: Image.Image, name: str = "the mask") -> Image.Image:
    """``picture`` as a mask, mode L: white where another picture is repainted, black where it stays.

    White paint on nothing, as drawing programs save it, is a mask too. Raises PictureError for other transparency:
    some programs repaint where a picture is transparent, others where it is not.
    """
    picture = upright(picture, name)
    if is_transparent(picture):
        with_alpha = _rgba(picture)
        alpha, levels = with_alpha.getchannel("A"), with_alpha.convert("L")
        lowest, highest = alpha.getextrema()
        if lowest != highest and np.asarray(levels)[np.asarray(alpha) > 0].min() >= _NEARLY_WHITE:
            return alpha
        if lowest != highest or not highest:
            raise PictureError(
                f"{name} says in its transparency what to repaint, and programs disagree on which way. "
                "Save it in black and white: white where the picture is to be repainted."
            )
        picture = with_alpha.convert("RGB")
    return picture.convert("L") if picture.mode in ("1", "L", "RGB") else on_white(picture).convert("L")


def upright(picture: Image.Image, name: str = "the picture") -> Image.Image:
    """``picture`` turned as its EXIF says, with 8 bits a channel; its transparency stays. Raises PictureError."""
    picture.load()
    turn = _UPRIGHT.get(_orientation(picture))
    picture = _eight_bits(picture, name)
    if turn is None:
        return picture
    picture = picture.transpose(turn)
    for kept in _HOLD_ORIENTATION:  # whoever turns it once more would turn it away
        picture.info.pop(kept, None)
    return picture


def on_white(picture: Image.Image) -> Image.Image:
    """``picture`` (8 bits a channel) in RGB, on white where it is transparent."""
    if is_transparent(picture):
        picture = _rgba(picture)
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def is_transparent(picture: Image.Image) -> bool:
    """Whether it can have transparent parts, in a channel, a palette or as one colour."""
    palette = getattr(picture.palette, "mode", "") if picture.mode == "P" else ""
    return picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info or palette == "RGBA"


def _load(handle: BinaryIO, name: str, formats: tuple[str, ...]) -> Image.Image:
    with Image.open(handle, formats=formats) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise PictureError(
                f"{name} is {picture.width} x {picture.height} pixels; at most {MAX_PIXELS:,} in all are read. "
                "Make it smaller."
            )
        picture.load()
        return picture


def _orientation(picture: Image.Image) -> int:
    if picture.format == "TIFF":  # Pillow turns these itself while loading; before version 10 its EXIF does not say so
        return 1
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block raises anything, and says nothing about the picture
        return 1


def _eight_bits(picture: Image.Image, name: str) -> Image.Image:
    """Levels of 16 bits, 32 bits and fractions as 8 bits, where Pillow would cut off at 255."""
    if picture.mode != "I" and picture.mode != "F" and not picture.mode.startswith("I;16"):
        return picture
    levels = np.asarray(picture, dtype=np.float32)
    if not np.isfinite(levels).all() or levels.min() < 0 or levels.max() > 65535:
        raise PictureError(
            f"{name} has levels other than 0 to 65535, or 0 to 1 in fractions. Save it with 8 or 16 bits a channel."
        )
    # Fractions are 0 to 1 by custom, but Pillow's own F has the levels of the 8 bits it was made from.
    scale = 1 / 257
    if picture.mode == "F" and levels.max() <= 255:
        scale = 255.0 if levels.max() <= 1 else 1.0
    eight = Image.fromarray((levels * scale).round().astype(np.uint8))
    key = picture.info.get("transparency")
    if isinstance(key, int):  # one level is transparent
        eight = Image.merge("LA", (eight, Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8))))
    return eight


def _rgba(picture: Image.Image) -> Image.Image:
    if picture.mode == "La":
        picture = picture.convert("LA")
    return picture.convert("RGBA")


def _called(source: object) -> str:
    return "the picture" if isinstance(source, bytes) else printable(str(source))


def _reason(error: Exception) -> str:
    return printable(str(error))[:200] or type(error).__name__
