"""Aspect-ratio buckets: every picture is resized to the nearest of a few sizes, which have about the same area."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ppcl.validation.values import aspect_ratio


def bucket_sizes(aspects: Sequence[str], height: int, width: int, multiple: int) -> list[tuple[int, int]]:
    """Return a size (height, width) in pixels for each aspect ratio "w:h".

    Each has about the area `height * width`, and sides that are multiples of `multiple`.
    """
    sizes = []
    for aspect in aspects:
        ratio, area = aspect_ratio(aspect), height * width
        sides = (math.sqrt(area / ratio), math.sqrt(area * ratio))
        rows, columns = (max(multiple, round(side / multiple) * multiple) for side in sides)
        sizes.append((rows, columns))
    return sizes


def nearest(picture: Image.Image, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the one of `sizes` (height, width) whose aspect ratio is nearest to the picture's, by its logarithm."""
    ratio = math.log(picture.width / picture.height)
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - ratio))


def fit(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """Scale a picture to cover `size` (height, width) and crop its centre; returns `[3, H, W]` in [-1, 1]."""
    height, width = size
    if picture.size != (width, height):
        scale = max(width / picture.width, height / picture.height)
        covering = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
        picture = picture.resize(covering, Image.Resampling.LANCZOS)
        left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
        picture = picture.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1.0
