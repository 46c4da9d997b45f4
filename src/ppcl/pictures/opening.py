"""Opens every picture that a user brings: to cache, to edit, or to steer a ControlNet.

Importing this loads no torch.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

IMAGES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif", "avif")  # of several, a sample's first is taken
_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF: bits a channel, and whether 0 is white (0) or black (1)
_SIXTEEN = ("PNG", "PPM")  # formats that are opened as 32-bit integers where their own range is 16 bits


class UnusablePictureError(ValueError):
    """A picture that cannot be used. The message says why, and goes on from "the picture"."""


def open_picture(source: str | Path | bytes) -> Image.Image:
    """Return a picture, given as a file or as its bytes, in RGB with 8 bits a channel.

    It is turned as its EXIF orientation says. What is transparent becomes white. Of 16 bits the higher 8 are taken,
    with the range that the format states; greys with a range of 12 bits in 16 keep theirs. Of several pages or frames,
    the first is taken. Colours of CMYK are converted without a colour profile.

    Raises `UnusablePictureError` for a damaged file, for values without a stated range (floats, 32-bit integers), and
    for more pixels than Pillow takes; `OSError` if there is no such file.
    """
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        with _opened(content) as picture:
            bits, inverted = _range(picture)
            upright = _upright(picture)
        return _on_white(upright if bits is None else _eight_bits(upright, bits, inverted))
    except UnusablePictureError:
        raise
    except Image.DecompressionBombError:
        raise UnusablePictureError(f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from None
    except MemoryError:
        raise UnusablePictureError("takes more memory than there is") from None
    except UnidentifiedImageError:
        raise UnusablePictureError("does not decode: its format is not read") from None
    except Exception as error:  # decoders raise errors of many types for damaged files
        said = str(error).partition("\n")[0]
        raise UnusablePictureError(f"does not decode: its file is damaged or cut off{said and f' ({said})'}") from None


def picture_digest(path: str) -> str:
    """Return a hash of a picture's file.

    It says if the picture is turned upright, and if other pixels are made from it than a plain conversion to RGB would
    give. Both were not always done, so that what was drawn from such a picture before has another hash.
    """
    content = Path(path).read_bytes()
    marks = [hashlib.sha256(content).hexdigest()[:16]]
    with _opened(content) as picture:
        if _orientation(picture) != 1:
            marks.append("upright")
        plain = _upright(picture).convert("RGB")
    if open_picture(content).tobytes() != plain.tobytes():
        marks.append("rgb")
    return " ".join(marks)


def _opened(content: bytes) -> Image.Image:
    """Return a picture as Pillow decodes it, of any format but PostScript: Pillow gives that to another program."""
    Image.init()
    picture = Image.open(io.BytesIO(content), formats=[name for name in Image.ID if name != "EPS"])
    picture.load()
    return picture


def _orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation of a picture: 1 if it is upright, or says nothing that can be read."""
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # EXIF data that is damaged
        return 1


def _upright(picture: Image.Image) -> Image.Image:
    """Return a picture turned as its EXIF orientation says. Without a valid one it is returned as it is."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # EXIF data that is damaged, in a picture that is not
        return picture


def _range(picture: Image.Image) -> tuple[int | None, bool]:
    """Return the bits of a grey picture with more than 8, else None; and whether 0 is its white.

    Raises `UnusablePictureError` if the format states no range.
    """
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in _SIXTEEN):
        kind = "floats" if picture.mode == "F" else "32-bit integers"
        raise UnusablePictureError(f"holds {kind}, which state no range from black to white: save it with 8 or 16 bits")
    if not picture.mode.startswith("I"):
        return None, False
    tags = getattr(picture, "tag_v2", {})
    return int(tags.get(_BITS, (16,))[0]), tags.get(_PHOTOMETRIC) == 0


def _eight_bits(picture: Image.Image, bits: int, inverted: bool) -> Image.Image:
    """Return a grey picture with its highest 8 of `bits`. A value that stands for transparency becomes white."""
    values = np.asarray(picture).astype(np.int64)
    grey = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
    grey = 255 - grey if inverted else grey
    transparent = picture.info.get("transparency")
    return Image.fromarray(grey if transparent is None else np.where(values == transparent, np.uint8(255), grey))


def _on_white(picture: Image.Image) -> Image.Image:
    """Return a picture in RGB, with white under what is transparent."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
