"""A user's picture is read as training reads it, whatever it is made of, or refused in a sentence."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sun.user_pictures import (
    MAX_PIXELS,
    PictureError,
    flatten,
    flatten_mask,
    open_picture,
    read_mask,
    read_picture,
    upright,
)

EXAMPLES = int(os.environ.get("SUN_FUZZ_EXAMPLES", "200"))
RAMP = np.linspace(0, 1, 64)[None].repeat(48, 0)


def stored(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def flag() -> Image.Image:
    """A picture that is different in every orientation: red above, blue at the left of what is below."""
    picture = Image.new("RGB", (24, 40), "white")
    picture.paste("red", (0, 0, 24, 10))
    picture.paste("blue", (0, 10, 8, 40))
    return picture


# By EXIF's definition: how a camera stores an upright picture under each number.
STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_a_picture_stands_upright_as_its_exif_says(kind: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = STORED_AS[orientation]
    sideways = flag() if turn is None else flag().transpose(turn)
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    got = read_picture(stored(sideways, kind, exif=exif, **options))
    assert got.size == (24, 40)
    assert np.abs(np.asarray(got).astype(int) - np.asarray(flag())).mean() < 8
    assert got.getexif().get(0x0112, 1) == 1, "a second reader would turn it again"
    np.testing.assert_array_equal(flatten(got), got)


def test_orientation_in_xmp_and_of_a_mask_and_of_16_bits_counts():
    xmp = b'<x:xmpmeta xmlns:tiff="t"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    got = read_picture(stored(flag().transpose(Image.Transpose.ROTATE_90), "JPEG", xmp=xmp, quality=95))
    assert got.size == (24, 40)
    assert not got.info.get("xmp")
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray((RAMP * 65535).astype(np.uint16))  # 64 x 48
    assert read_picture(stored(deep, exif=exif)).size == (48, 64)
    assert read_mask(stored(deep, exif=exif)).size == (48, 64)


def test_broken_exif_does_not_cost_the_picture():
    for exif in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 9):
        assert read_picture(stored(flag(), "JPEG", exif=exif)).size == (24, 40)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_parts_are_white(mode: str):
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[16:48, 16:48] = (255, 0, 0, 255)
    picture = Image.fromarray(pixels).convert("LA" if mode == "LA" else "RGBA")
    if mode == "PA":
        picture = Image.new("PA", (64, 64))
        picture.putpalette([0, 0, 0, 255, 0, 0])
        picture.paste((1, 255), (16, 16, 48, 48))
        assert picture.getpixel((0, 0)) == (0, 0)
    got = read_picture(stored(picture, "TIFF" if mode == "PA" else "PNG"))
    assert got.mode == "RGB"
    assert got.getpixel((0, 0)) == (255, 255, 255)
    assert got.getpixel((32, 32)) == ((76, 76, 76) if mode == "LA" else (255, 0, 0))


def test_half_transparent_is_half_white():
    assert flatten(Image.new("RGBA", (2, 2), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("transparency", [0, b"\x00\xff", b"\x00"])
def test_a_palette_with_transparency_is_laid_on_white(transparency: object):
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 0, 128, 0])
    picture.paste(0, (0, 0, 4, 4))
    for kind in ("PNG", "GIF") if isinstance(transparency, int) else ("PNG",):
        got = read_picture(stored(picture, kind, transparency=transparency))
        assert got.getpixel((0, 0)) == (255, 255, 255), kind
        assert got.getpixel((6, 6)) == (0, 128, 0), kind


def test_one_transparent_colour_is_white_in_8_and_in_16_bits():
    colours = Image.new("RGB", (4, 4), (9, 9, 9))
    colours.putpixel((3, 3), (200, 0, 0))
    assert read_picture(stored(colours, transparency=(9, 9, 9))).getpixel((0, 0)) == (255, 255, 255)
    levels = np.full((4, 4), 30_000, np.uint16)
    levels[0] = 1000
    got = read_picture(stored(Image.fromarray(levels), transparency=1000))
    assert got.getpixel((0, 0)) == (255, 255, 255)
    assert got.getpixel((0, 3)) == (117, 117, 117)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_and_not_cut_off(kind: str):
    got = np.asarray(read_picture(stored(Image.fromarray((RAMP * 65535).astype(np.uint16)), kind)))
    np.testing.assert_allclose(got[0, :, 0], RAMP[0] * 255, atol=1)


def test_16_bits_of_colour_are_scaled():
    # Pillow writes no 16-bit colours; this is a PNG of one row by hand, and its middle is half red.
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    row = b"\0" + b"".join(struct.pack(">HHH", level, 0, 65535) for level in (0, 32_768, 65_535))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 1, 16, 2, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    got = np.asarray(read_picture(png))
    np.testing.assert_array_equal(got[0], [[0, 0, 255], [128, 0, 255], [255, 0, 255]])


@pytest.mark.parametrize(
    ("scale", "dtype"), [(65535, np.int32), (1.0, np.float32), (255.0, np.float32), (65535, np.float32)]
)
def test_levels_of_32_bits_and_fractions_are_scaled(scale: float, dtype: type):
    got = np.asarray(read_picture(stored(Image.fromarray((RAMP * scale).astype(dtype)), "TIFF")))
    np.testing.assert_allclose(got[0, :, 0], RAMP[0] * 255, atol=1)


@pytest.mark.parametrize("level", [-1.0, np.nan, np.inf, 1e9])
def test_levels_that_are_no_picture_are_refused(level: float):
    levels = RAMP.astype(np.float32)
    levels[3, 3] = level
    with pytest.raises(PictureError, match="16 bits"):
        read_picture(stored(Image.fromarray(levels), "TIFF"))


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("LAB", "TIFF")])
def test_other_colour_models_become_rgb(mode: str, kind: str):
    if mode == "LAB":
        picture = Image.merge("LAB", [Image.new("L", (8, 8), level) for level in (138, 81 + 128, 70 + 128 - 128)])
    else:
        picture = Image.new("RGB", (8, 8), (200, 40, 30)).convert(mode)
    got = read_picture(stored(picture, kind)).getpixel((4, 4))
    assert got[0] > 150 > got[1], got


def test_the_first_frame_of_an_animation_is_read():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        data = stored(frames[0], kind, save_all=True, append_images=frames[1:])
        assert read_picture(data).getpixel((4, 4))[0] > 240, kind


def test_what_would_be_blank_on_white_is_refused():
    drawn = np.full((64, 64, 4), 255, np.uint8)
    drawn[..., 3] = 0
    with pytest.raises(PictureError, match="nothing but white"):
        read_picture(stored(Image.fromarray(drawn)))
    drawn[16:48, 16:48, 3] = 255
    with pytest.raises(PictureError, match="nothing but white"):
        read_picture(stored(Image.fromarray(drawn)), "the control picture")
    for mode in ("RGB", "RGBA"):  # a white canvas of which nothing can be seen through is one
        assert read_picture(stored(Image.new(mode, (8, 8), "white"))).getpixel((0, 0)) == (255, 255, 255)


def test_white_paint_on_nothing_is_a_mask():
    drawn = np.full((64, 64, 4), 255, np.uint8)
    drawn[..., 3] = 0
    drawn[16:48, 16:48, 3] = 255
    got = np.asarray(read_mask(stored(Image.fromarray(drawn))))
    assert got.mean() == 255 * 32 * 32 / 64 / 64
    assert got[32, 32] == 255


@pytest.mark.parametrize("colour", [(0, 0, 0), (120, 60, 30)])
def test_a_hole_in_a_picture_is_refused_as_a_mask_because_programs_disagree(colour: tuple[int, int, int]):
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., :3] = colour
    pixels[16:48, 16:48, 3] = 255
    with pytest.raises(PictureError, match="black and white"):
        read_mask(stored(Image.fromarray(pixels)))
    with pytest.raises(PictureError, match="black and white"):
        read_mask(stored(Image.new("RGBA", (8, 8), (255, 255, 255, 0))))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "I;16"])
def test_a_mask_in_black_and_white_is_one_in_every_mode(mode: str):
    picture = Image.new("L", (8, 8), 0)
    picture.paste(255, (0, 0, 4, 8))
    deep = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    got = np.asarray(flatten_mask(deep if mode == "I;16" else picture.convert(mode)))
    assert set(got[:, :4].ravel()) == {255}
    assert set(got[:, 4:].ravel()) == {0}


def test_soft_masks_stay_soft():
    soft = Image.fromarray((RAMP * 255).astype(np.uint8))
    np.testing.assert_array_equal(read_mask(stored(soft)), soft)


def test_scans_are_read_up_to_a_bound_and_refused_beyond(tmp_path: Path):
    Image.new("1", (8000, 8000), 1).save(tmp_path / "page.png")
    assert read_picture(tmp_path / "page.png").size == (8000, 8000)
    for size in ((20_000, 10_000), (MAX_PIXELS // 1000 + 1, 1000)):
        Image.new("1", size).save(tmp_path / "scan.png")
        with pytest.raises(PictureError, match=r"scan.png .*pixels.*Make it smaller"):
            open_picture(tmp_path / "scan.png")


def test_only_named_formats_are_opened_whatever_a_file_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def starts(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen.__init__", starts)
    evil = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(touch) show\nshowpage\n%%EOF\n"
    for name in ("x.png", "x.eps", "x.jpg"):
        (tmp_path / name).write_bytes(evil)
        with pytest.raises(PictureError, match="not a picture that can be read"):
            read_picture(tmp_path / name)
    for kind in ("ICO", "PCX", "TGA", "PPM", "DDS", "PDF"):
        with pytest.raises(PictureError):
            read_picture(stored(flag(), kind))


def test_pipes_devices_folders_and_missing_files_are_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "device.png")
    for path, reason in {
        tmp_path / "pipe.png": "not a regular file",
        tmp_path / "device.png": "not a regular file",
        tmp_path: "is a folder",
        tmp_path / "none.png": "does not exist",
        "nul\0.png": "no file name",
    }.items():
        with pytest.raises(PictureError, match=reason):
            read_picture(path)


def test_errors_carry_no_control_characters(tmp_path: Path):
    with pytest.raises(PictureError) as error:
        read_picture(tmp_path / "\x1b[2J.png")
    assert "\x1b" not in str(error.value)


def test_a_truncated_picture_is_refused():
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        data = stored(Image.effect_noise((64, 64), 50).convert("RGB"), kind)
        with pytest.raises(PictureError):
            read_picture(data[: len(data) // 2])


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_pictures_are_read_or_refused_in_a_sentence(data: st.DataObject):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    content = bytearray(stored(flag(), kind, **options))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        picture = read_picture(bytes(content))
    except PictureError:
        return
    assert picture.mode == "RGB"


def test_upright_leaves_transparency_to_whoever_crops_first():
    assert upright(Image.new("RGBA", (4, 4))).mode == "RGBA"
