"""Sounds as pictures: a spectrogram, which is stored and compared, and a wav beside it to listen to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import wavfile
from scipy.signal import ShortTimeFFT
from scipy.signal.windows import hann

from ppcl.artifacts.files import atomic_path
from ppcl.errors import UsageError

WINDOW, HOP = 1024, 512  # samples
SHORTEST = 4 * WINDOW  # samples; fewer would make a picture too narrow for SSIM, and are followed by silence
RANGE = 80.0  # dB from black to white
_MAKERS = ("vocoder", "audio_vae", "vae")  # components that may make the sound, the last one of a pipeline first
_RATES = ("output_sampling_rate", "sampling_rate", "sample_rate")


def spectrogram(sound: np.ndarray) -> Image.Image:
    """Return a grey picture of a sound `[channels, samples]` in [-1, 1].

    Time goes to the right and frequency upwards, linearly, with the channels one above the other. White is a sine of
    full scale, black is 80 dB below it. A column stands for 512 samples.
    """
    padded = np.pad(sound.astype(np.float64), ((0, 0), (0, max(0, SHORTEST - sound.shape[1]))))
    window = hann(WINDOW, sym=False)
    found = np.abs(ShortTimeFFT(window, HOP, fs=1.0).stft(padded)) / (window.sum() / 2)
    decibels = 20 * np.log10(np.maximum(found, 1e-12))
    grey = (255 * (1 + decibels / RANGE)).clip(0, 255).round().astype(np.uint8)[:, ::-1]
    return Image.fromarray(grey.reshape(-1, grey.shape[2])).convert("RGB")


def sampling_rate(pipeline: Any) -> int:
    """Return the samples a second of a pipeline's sounds, from the config of the component that makes them.

    Raises `UsageError` if none says it.
    """
    parts = [getattr(pipeline, name, None) for name in _MAKERS]
    for config in (part.config for part in parts if part is not None):
        for key in _RATES:
            rate = getattr(config, key, None)
            if isinstance(rate, int):
                return rate
    raise UsageError(
        f"{type(pipeline).__name__} does not say the sampling rate of its sounds: add sampling_rate to the config.json "
        f"of its {' or '.join(name for name, part in zip(_MAKERS, parts, strict=True) if part is not None)}."
    )


def write_sound(path: Path, sound: np.ndarray, rate: int) -> None:
    """Write a wav with 16 bits a sample of a sound `[channels, samples]` in [-1, 1]."""
    samples = (sound.clip(-1, 1) * np.iinfo(np.int16).max).round().astype(np.int16)
    with atomic_path(path) as temporary:
        wavfile.write(temporary, rate, samples.T)
