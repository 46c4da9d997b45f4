"""Reads pictures, videos and sounds from the output of a pipeline's call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ppcl.errors import UsageError
from ppcl.pictures.sounds import sampling_rate, spectrogram
from ppcl.pictures.videos import frame_rate, sheet_of


@dataclass(frozen=True)
class Drawn:
    """Picture, video or sound that was drawn for one prompt.

    `picture`: a PIL picture, of a video the sheet of its frames, and of a sound its spectrogram. `frames`: those of a
    video, of which `frame_rate` make a second. `sound`: `[channels, samples]` in [-1, 1], of which `sampling_rate`
    samples make a second.
    """

    picture: Any
    frames: tuple[Image.Image, ...] = ()
    frame_rate: float = 0.0
    sound: np.ndarray | None = None
    sampling_rate: int = 0


def field_of(pipeline: Any) -> str:
    """Return the field of its output that a pipeline draws into: `images`, `frames` or `audios`.

    It goes by the part that turns latents into them, and of sounds has a sampling rate.
    """
    for processor, field in (("video_processor", "frames"), ("image_processor", "images")):
        if hasattr(pipeline, processor):
            return field
    try:
        sampling_rate(pipeline)
    except UsageError:
        return "images"
    return "audios"


def drawn_by(pipeline: Any, output: Any, arguments: Mapping[str, Any]) -> list[Drawn]:
    """Return what a pipeline has drawn for each prompt, from what its call with `arguments` returned.

    Raises `UsageError` if that is neither pictures, nor videos, nor sounds.
    """
    images, videos, sounds = (getattr(output, name, None) for name in ("images", "frames", "audios"))
    if images is not None:
        return [Drawn(image) for image in images]
    if videos is not None:
        rate, sounds = frame_rate(pipeline, arguments), getattr(output, "audio", None)
        return [
            _video(pipeline, video, rate, None if sounds is None else sounds[number])
            for number, video in enumerate(videos)
        ]
    if sounds is not None:
        rates = sampling_rate(pipeline)
        return [Drawn(spectrogram(sound), sound=sound, sampling_rate=rates) for sound in map(_sound, sounds)]
    raise UsageError(
        f"{type(pipeline).__name__} returns a {type(output).__name__}, with neither images nor frames nor audios: "
        "leave generate and evaluate out of stages."
    )


def _video(pipeline: Any, video: Any, rate: float, sound: Any) -> Drawn:
    """Return a video, given as PIL frames, as an array `[F, H, W, C]` or as a tensor `[F, C, H, W]`, in [0, 1]."""
    from diffusers.utils import numpy_to_pil

    if isinstance(video, Tensor):
        video = video.permute(0, 2, 3, 1).float().cpu().numpy()
    frames = tuple(numpy_to_pil(video) if isinstance(video, np.ndarray) else video)
    if sound is None:
        return Drawn(sheet_of(frames), frames, rate)
    return Drawn(sheet_of(frames), frames, rate, _sound(sound), sampling_rate(pipeline))


def _sound(sound: Any) -> np.ndarray:
    """Return a sound `[channels, samples]`, given with or without the dimension of channels."""
    return np.atleast_2d(torch.as_tensor(sound).detach().float().cpu().numpy())
