"""Aspect-ratio buckets: every picture is resized to the nearest of a few sizes, which have about the same area.

Given pictures of an edit and its result are cut to the same part, so that nothing moves between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Pipelines round both sides, which changes an aspect ratio by up to 4% at a megapixel.
ROUNDING = 0.05


@dataclass(frozen=True)
class Cut:
    """A part of a picture, its sides as shares of the picture's."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def middle(cls, picture: Image.Image, ratio: float) -> Cut:
        """Return the largest centred part of a picture with the aspect ratio width / height `ratio`."""
        own = picture.width / picture.height
        across, down = min(1.0, ratio / own), min(1.0, own / ratio)
        return cls((1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2)

    @property
    def share(self) -> float:
        """This part's area, as a share of the picture's."""
        return (self.right - self.left) * (self.bottom - self.top)

    def of(self, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
        """Return this part of a picture, resized to `size` (height, width) by the filter of diffusers' pipelines."""
        (width, height), (rows, columns) = picture.size, size
        box = self.left * width, self.top * height, self.right * width, self.bottom * height
        return picture.resize((columns, rows), Image.Resampling.LANCZOS, box)


def bucket_size(ratio: float, area: int, multiple: int) -> tuple[int, int]:
    """Return the size (height, width) in pixels of about `area` for the aspect ratio width / height `ratio`.

    Its sides are multiples of `multiple`.
    """
    sides = (math.sqrt(area / ratio), math.sqrt(area * ratio))
    rows, columns = (max(multiple, round(side / multiple) * multiple) for side in sides)
    return rows, columns


def nearest(picture: Image.Image, ratios: Sequence[float]) -> int:
    """Return the number of the one of `ratios`, width / height, that is nearest to the picture's by its logarithm."""
    own = math.log(picture.width / picture.height)
    return min(range(len(ratios)), key=lambda number: abs(math.log(ratios[number]) - own))


def cut_like(picture: Image.Image, given: Image.Image, ratio: float) -> Cut:
    """Return the part of an edit's result that shows the same as the part of `given` with the aspect ratio `ratio`.

    That is the same part if both have the same aspect ratio up to rounding; otherwise it is the picture's own middle.
    """
    difference = math.log(picture.width / picture.height) - math.log(given.width / given.height)
    return Cut.middle(given if abs(difference) < ROUNDING else picture, ratio)


def fit(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """Scale a picture to cover `size` (height, width) and crop its centre; returns `[3, H, W]` in [-1, 1]."""
    height, width = size
    if picture.size != (width, height):
        scale = max(width / picture.width, height / picture.height)
        covering = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
        picture = picture.resize(covering, Image.Resampling.LANCZOS)
        left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
        picture = picture.crop((left, top, left + width, top + height))
    return to_tensor(picture)


def to_tensor(picture: Image.Image) -> Tensor:
    """Return the pixels of a picture as float32 `[3, H, W]` in [-1, 1]."""
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1.0
