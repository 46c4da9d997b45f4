"""How near a variant's pictures are to the teacher's from equal prompts and seeds: PSNR and SSIM of each.

Of a video they are the mean over its frames, and of a sound they are those of its spectrogram.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ppcl.artifacts.scores import Likeness
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.parallel import dealt, merged, together
from ppcl.pictures.images import image_folder, picture_path, read_frames

MOST_DECIBELS = 100.0  # stands for the infinite PSNR of equal pictures


def likeness(image: Image.Image, teacher: Image.Image) -> Likeness:
    """Return PSNR and SSIM of two RGB pictures of the same size, which is larger than 5x5 pixels.

    PSNR is in dB, at most `MOST_DECIBELS`. SSIM has a Gaussian window of 11x11 pixels with a standard deviation of 1.5
    (Wang et al. 2004), mirrors pictures at their borders, and is the mean over channels.
    """
    ours, theirs = _as_tensor(image), _as_tensor(teacher)
    psnr = peak_signal_noise_ratio(ours, theirs, data_range=1.0).item()
    ssim = cast(Tensor, structural_similarity_index_measure(ours, theirs, data_range=1.0)).item()
    return Likeness(min(psnr, MOST_DECIBELS), ssim)


def likenesses(run: Run, variant: str) -> list[Likeness]:
    """Return the likeness of each picture of a variant to the teacher's. Several ranks divide the pictures.

    Raises `UsageError` if a picture and the teacher's differ in size.
    """
    found = []
    with together():
        for number in run.track(dealt(range(len(run.prompts))), f"{variant}: pictures"):
            ours, theirs = (read_frames(run, name, number) for name in (variant, "teacher"))
            if (len(ours), ours[0].size) != (len(theirs), theirs[0].size):
                path = picture_path(image_folder(run, variant), number)
                raise UsageError(
                    f"{path} has {_size(ours)} pixels, and the teacher's {_size(theirs)}: delete both folders and draw "
                    "them again."
                )
            found.append(Likeness.mean([likeness(*pair) for pair in zip(ours, theirs, strict=True)]))
    return merged(found)


def _size(frames: Sequence[Image.Image]) -> str:
    """Return the size of a picture, or of a video's frames, for a message."""
    size = f"{frames[0].width}x{frames[0].height}"
    return size if len(frames) == 1 else f"{len(frames)} frames of {size}"


def _as_tensor(image: Image.Image) -> Tensor:
    """Return a picture `[1, 3, H, W]` with values in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
