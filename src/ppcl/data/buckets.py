"""Aspect buckets: every picture goes to the nearest of a few shapes of about one area."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ppcl.validation.values import aspect_ratio


def bucket_sizes(aspects: Sequence[str], height: int, width: int, multiple: int) -> list[tuple[int, int]]:
    """(height, width) of each aspect "w:h" at the area of `height` times `width`, in steps of `multiple` pixels."""
    sizes = []
    for aspect in aspects:
        ratio, area = aspect_ratio(aspect), height * width
        sides = (math.sqrt(area / ratio), math.sqrt(area * ratio))
        rows, columns = (max(multiple, round(side / multiple) * multiple) for side in sides)
        sizes.append((rows, columns))
    return sizes


def nearest(picture: Image.Image, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose aspect is closest, by ratio."""
    ratio = math.log(picture.width / picture.height)
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - ratio))


def fit(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """Scaled to cover `size` (height, width) and cut around the centre: `[3, H, W]` in [-1, 1]."""
    height, width = size
    if picture.size != (width, height):
        scale = max(width / picture.width, height / picture.height)
        covering = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
        picture = picture.resize(covering, Image.Resampling.LANCZOS)
        left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
        picture = picture.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1.0
