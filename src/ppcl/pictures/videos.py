"""Videos as pictures: all frames on one sheet, which is stored and compared, and an mp4 beside it to watch."""

from __future__ import annotations

import inspect
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from ppcl.artifacts.files import atomic_path

FRAME_RATE = 16.0  # frames a second of an mp4, where the pipeline's call says nothing


def sheet_of(frames: Sequence[Image.Image]) -> Image.Image:
    """Return all frames of a video on one picture, edge to edge in rows, in about as many rows as columns."""
    columns, rows = _layout(len(frames))
    width, height = frames[0].size
    sheet = Image.new("RGB", (columns * width, rows * height))
    for number, frame in enumerate(frames):
        sheet.paste(frame, (number % columns * width, number // columns * height))
    return sheet


def cut(sheet: Image.Image, count: int) -> list[Image.Image]:
    """Return the `count` frames on a sheet that `sheet_of` has made of them."""
    columns, rows = _layout(count)
    width, height = sheet.width // columns, sheet.height // rows
    corners = ((number % columns * width, number // columns * height) for number in range(count))
    return [sheet.crop((left, top, left + width, top + height)) for left, top in corners]


def _layout(count: int) -> tuple[int, int]:
    """Return the columns and rows of a sheet with `count` frames."""
    columns = math.ceil(math.sqrt(count))
    return columns, math.ceil(count / columns)


def frame_rate(pipeline: Any, arguments: Mapping[str, Any]) -> float:
    """Return the frames a second of a pipeline's videos, as its call with `arguments` says, or `FRAME_RATE`."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    for name in ("frame_rate", "fps"):
        if name in parameters:
            found = arguments.get(name, parameters[name].default)
            if isinstance(found, int | float):
                return float(found)
    return FRAME_RATE


def lacks_encoder() -> str | None:
    """Return what to install so that mp4 files can be written; None if that is there."""
    if find_spec("imageio") is None:  # diffusers takes OpenCV only then
        return None if find_spec("cv2") else "imageio imageio-ffmpeg"
    return None if find_spec("imageio_ffmpeg") else "imageio-ffmpeg"


def write_video(path: Path, frames: Sequence[Image.Image], rate: float) -> None:
    """Write an mp4 of `rate` frames a second. Sides of an odd number of pixels become one pixel longer."""
    from diffusers.utils import export_to_video

    with tempfile.TemporaryDirectory() as folder, atomic_path(path) as temporary:
        made = Path(folder) / path.name  # encoders go by the ending of the name
        export_to_video(list(frames), str(made), fps=rate, macro_block_size=2)
        shutil.copyfile(made, temporary)
