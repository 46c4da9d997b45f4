"""Every picture that a user brings comes out upright, in RGB with 8 bits, and on white, or is refused with a reason."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from ppcl.command import prepare
from ppcl.errors import UsageError
from ppcl.pictures.opening import UnusablePictureError, open_picture, picture_digest

GREYS = np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)
CLEAR, HALF = (255, 0, 0, 0), (255, 0, 0, 128)


def stored(picture: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **settings)
    return buffer.getvalue()


def pixels(content: bytes) -> list[list[int]]:
    """The first row of a picture."""
    picture = open_picture(content)
    assert picture.mode == "RGB"
    return np.asarray(picture)[0].tolist()


def oriented(kind: str, orientation: int, mode: str = "RGB") -> bytes:
    """A picture of 40x20 pixels whose left half is black, with an EXIF orientation."""
    picture = Image.new(mode, (40, 20), "white")
    picture.paste("black", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[274] = orientation
    return stored(picture, kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("orientation", "dark"), [(1, "left"), (3, "right"), (6, "top"), (8, "bottom")])
def test_pictures_are_turned_as_they_say(kind: str, orientation: int, dark: str) -> None:
    picture = open_picture(oriented(kind, orientation))
    assert picture.size == ((40, 20) if dark in ("left", "right") else (20, 40))
    place = {"left": (2, 10), "right": (37, 10), "top": (10, 2), "bottom": (10, 37)}[dark]
    values = np.asarray(picture)
    assert values[place[::-1]].max() < 10
    assert values.mean() == pytest.approx(127.5, abs=2)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_orientation_that_does_not_read_is_none(exif: bytes) -> None:
    assert open_picture(stored(Image.new("RGB", (4, 2)), "JPEG", exif=exif)).size == (4, 2)


def deep_png(row: bytes, color: int, width: int) -> bytes:
    """A PNG of one row with 16 bits a channel."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, 16, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def tiff_of_12_bits() -> bytes:
    """Three greys, 0, 0x800 and 0xfff, packed into five bytes."""
    tags = {256: 3, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 5}
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags.items())
    row = b"\x00\x08\x00\xff\xf0"
    return b"II*\0" + struct.pack("<I", 14) + row + b"\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    "content",
    [
        stored(Image.fromarray(GREYS)),
        stored(Image.fromarray(GREYS), "TIFF"),
        stored(Image.fromarray(GREYS.astype(">u2")), "TIFF"),
        b"P5 3 1 65535\n" + GREYS.astype(">u2").tobytes(),
        b"P5 3 1 4095\n" + (GREYS >> 4).astype(">u2").tobytes(),
        tiff_of_12_bits(),
        deep_png(np.repeat(GREYS.astype(">u2").reshape(-1), 3).tobytes(), 2, 3),
    ],
    ids=["png", "tiff", "big-endian", "pgm", "pgm-12-bits", "tiff-12-bits", "colour"],
)
def test_deep_greys_keep_their_range(content: bytes) -> None:
    assert pixels(content) == [[0] * 3, [128] * 3, [255] * 3]


def test_where_zero_is_white_it_stays_white() -> None:
    assert pixels(stored(Image.fromarray(GREYS), "TIFF", tiffinfo={262: 0})) == [[255] * 3, [127] * 3, [0] * 3]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_what_is_transparent_is_white_and_what_is_half_so_is_mixed_with_it(kind: str) -> None:
    picture = Image.new("RGBA", (3, 1), CLEAR)
    picture.putpixel((1, 0), HALF)
    picture.putpixel((2, 0), (255, 0, 0, 255))
    settings = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert pixels(stored(picture, kind, **settings)) == [[255] * 3, [255, 127, 127], [255, 0, 0]]


def palette() -> Image.Image:
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    return picture


@pytest.mark.parametrize(
    "content",
    [
        stored(palette(), transparency=0),
        stored(palette(), transparency=b"\x00\xff"),
        stored(palette(), "GIF", transparency=0),
        stored(Image.fromarray(np.array([[7, 0]], np.uint8)), transparency=7),
        stored(Image.fromarray(np.array([[7, 0]], np.uint16)), transparency=7),
        stored(Image.fromarray(np.array([[[1, 2, 3], [0, 0, 0]]], np.uint8)), transparency=(1, 2, 3)),
        stored(Image.fromarray(np.array([[[0, 0], [0, 255]]], np.uint8))),
    ],
    ids=["palette", "palette-shares", "gif", "grey", "deep-grey", "colour", "grey-alpha"],
)
def test_transparency_of_every_kind_is_white(content: bytes) -> None:
    first, second = pixels(content)
    assert first == [255] * 3
    assert second in ([0, 0, 0], [0, 0, 255])


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_has_its_colours(kind: str) -> None:
    assert pixels(stored(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind))[0] == [255, 0, 0]


@pytest.mark.parametrize(("dtype", "said"), [(np.float32, "holds floats"), (np.int32, "holds 32-bit integers")])
def test_values_without_a_range_are_refused(dtype: type, said: str) -> None:
    with pytest.raises(UnusablePictureError, match=said):
        open_picture(stored(Image.fromarray(np.ones((2, 2), dtype)), "TIFF"))


def test_damaged_and_huge_pictures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stored(Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)), "JPEG")
    for content in (b"", b"no picture", whole[: len(whole) // 2], whole[:20]):
        with pytest.raises(UnusablePictureError, match="does not decode"):
            open_picture(content)
    with pytest.raises(UnusablePictureError, match=r"its file is damaged or cut off \(Truncated"):
        open_picture(whole[: len(whole) // 2])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnusablePictureError, match="has more than 200 pixels"):
        open_picture(whole)


def test_postscript_is_not_given_to_the_program_that_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(UnusablePictureError, match="its format is not read"):
        open_picture(stored(Image.new("RGB", (4, 4)), "EPS"))


def test_a_picture_that_is_read_as_ever_keeps_its_digest(tmp_path: Path) -> None:
    """Others get a mark, so that nothing that was drawn from them before is taken for the same."""
    kinds = {
        "plain": stored(Image.new("RGB", (4, 2), "red")),
        "opaque": stored(Image.new("RGBA", (4, 2), "red")),
        "turned": oriented("JPEG", 6),
        "clear": stored(Image.new("RGBA", (4, 2), CLEAR)),
        "deep": stored(Image.fromarray(GREYS)),
    }
    marks = {}
    for name, content in kinds.items():
        (tmp_path / name).write_bytes(content)
        marks[name] = picture_digest(str(tmp_path / name)).partition(" ")[2]
    assert marks == {"plain": "", "opaque": "", "turned": "upright", "clear": "rgb", "deep": "rgb"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (stored(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "it holds floats"),
        (stored(Image.new("RGB", (200, 200), "red"))[:100], "it does not decode"),
        (None, "cannot be read"),
    ],
    ids=["floats", "cut", "missing"],
)
def test_a_picture_to_edit_that_cannot_be_used_is_refused_at_once(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "picture.tiff"
    if content is not None:
        path.write_bytes(content)
    asked = ["model=tiny_qwen_image_edit", "stages=[generate]", "generate.prompt=a", f"generate.images=[{path}]"]
    with pytest.raises(UsageError, match=rf"generate\.images={path} .*{said}"):
        prepare([*asked, f"paths.runs_dir={tmp_path}", "trainer=cpu"])
