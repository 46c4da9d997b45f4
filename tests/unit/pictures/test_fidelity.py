"""PSNR and SSIM, compared with their definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ppcl.pictures.fidelity import MOST_DECIBELS, likeness


def plain_ssim(first: np.ndarray, second: np.ndarray) -> float:
    """SSIM of pictures `[H, W, 3]` with values in [0, 1], mirrored at their borders (Wang et al. 2004, Eq. 13-16)."""
    height, width, _ = first.shape
    first, second = (np.pad(image, ((5, 5), (5, 5), (0, 0)), mode="reflect") for image in (first, second))
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))[..., None]
    weights /= weights.sum()
    found = []
    for top in range(height):
        for left in range(width):
            x, y = (image[top : top + 11, left : left + 11] for image in (first, second))
            mx, my = (weights * x).sum((0, 1)), (weights * y).sum((0, 1))
            vx, vy = (weights * (x - mx) ** 2).sum((0, 1)), (weights * (y - my) ** 2).sum((0, 1))
            vxy = (weights * (x - mx) * (y - my)).sum((0, 1))
            c1, c2 = 0.01**2, 0.03**2
            found.append((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(found))


@pytest.mark.parametrize("noise", [2, 40])
def test_psnr_and_ssim_are_those_of_their_definitions(noise: int) -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    first = np.asarray(small.resize((40, 28), Image.Resampling.BICUBIC))
    second = np.clip(first + rng.normal(0, noise, first.shape), 0, 255).astype(np.uint8)
    found = likeness(Image.fromarray(first), Image.fromarray(second))
    error = ((first / 255 - second / 255) ** 2).mean()
    assert found.psnr == pytest.approx(10 * np.log10(1 / error), rel=1e-5)
    assert found.ssim == pytest.approx(plain_ssim(first / 255, second / 255), abs=1e-5)


def test_equal_pictures_have_a_finite_psnr() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8))
    found = likeness(picture, picture)
    assert (found.psnr, found.ssim) == (MOST_DECIBELS, pytest.approx(1))
