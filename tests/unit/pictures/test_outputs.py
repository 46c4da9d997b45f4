"""Pictures of videos and sounds: sheets that are cut again without a loss, spectrograms, and the files beside them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from ppcl.errors import UsageError
from ppcl.pictures.fidelity import likeness
from ppcl.pictures.images import save_drawn, told_by
from ppcl.pictures.outputs import Drawn, drawn_by
from ppcl.pictures.sounds import HOP, WINDOW, sampling_rate, spectrogram, write_sound
from ppcl.pictures.videos import cut, frame_rate, lacks_encoder, sheet_of, write_video


class Video:
    """A pipeline of videos, as far as its outputs are read."""

    vae = SimpleNamespace(config=SimpleNamespace(sampling_rate=None))
    vocoder = SimpleNamespace(config=SimpleNamespace(output_sampling_rate=24000))

    def __call__(self, prompt: str, frame_rate: float = 24.0) -> Any: ...


class Sound:
    """A pipeline of sounds, as far as its outputs are read."""

    vae = SimpleNamespace(config=SimpleNamespace(sampling_rate=8000))

    def __call__(self, prompt: str) -> Any: ...


def frames(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(count)
    return [Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8)) for _ in range(count)]


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (5, 3, 2), (9, 3, 3), (17, 5, 4)])
def test_a_sheet_is_cut_into_its_frames(count: int, columns: int, rows: int) -> None:
    sheet = sheet_of(frames(count))
    assert sheet.size == (columns * 24, rows * 16)
    assert [frame.tobytes() for frame in cut(sheet, count)] == [frame.tobytes() for frame in frames(count)]


def test_frames_of_any_form_are_the_same_video() -> None:
    pictures = frames(3)
    array = np.stack([np.asarray(picture) for picture in pictures]).astype(np.float32) / 255
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    for video in (pictures, array, tensor):
        (drawn,) = drawn_by(Video(), SimpleNamespace(frames=[video]), {})
        assert [frame.tobytes() for frame in drawn.frames] == [picture.tobytes() for picture in pictures]
        assert (drawn.frame_rate, drawn.sound) == (24.0, None)


def test_a_video_may_have_sound() -> None:
    output = SimpleNamespace(frames=[frames(2)], audio=torch.zeros(1, 2, 500))
    (drawn,) = drawn_by(Video(), output, {"frame_rate": 12})
    assert (drawn.frame_rate, drawn.sampling_rate) == (12.0, 24000)
    assert drawn.sound is not None
    assert drawn.sound.shape == (2, 500)


@pytest.mark.parametrize("sounds", [np.zeros((2, 4000)), torch.zeros(2, 1, 4000)])
def test_a_sound_is_shown_by_its_spectrogram(sounds: Any) -> None:
    drawn = drawn_by(Sound(), SimpleNamespace(audios=sounds), {})
    assert len(drawn) == 2
    assert all(one.sound is not None and one.sound.shape == (1, 4000) for one in drawn)
    assert drawn[0].picture.height == WINDOW // 2 + 1


def test_what_is_neither_is_refused() -> None:
    with pytest.raises(UsageError, match="Sound returns a SimpleNamespace, with neither images nor frames nor audios"):
        drawn_by(Sound(), SimpleNamespace(texts=["a"]), {})


def test_a_sine_of_full_scale_is_white_at_its_frequency() -> None:
    time = np.arange(8 * HOP)
    sine = np.sin(2 * np.pi * 100 / WINDOW * time)  # 100 of the 512 bands
    both = np.asarray(spectrogram(np.stack([sine, np.zeros_like(sine)])))
    upper, lower = both[: WINDOW // 2 + 1], both[WINDOW // 2 + 1 :]
    assert (upper[WINDOW // 2 - 100, 2:-2] >= 254).all()
    assert upper[WINDOW // 2 - 300, 2:-2].max() == 0
    assert lower.max() == 0


def test_a_short_sound_has_a_picture_that_ssim_takes() -> None:
    picture = spectrogram(np.ones((1, 10)))
    assert picture.height == WINDOW // 2 + 1
    assert likeness(picture, picture).ssim == pytest.approx(1)


def test_rates_come_from_the_pipeline() -> None:
    assert (sampling_rate(Video()), sampling_rate(Sound())) == (24000, 8000)
    assert (frame_rate(Video(), {"frame_rate": 8}), frame_rate(Sound(), {})) == (8.0, 16.0)
    mute = SimpleNamespace(vae=SimpleNamespace(config=SimpleNamespace(latent_channels=4)))
    with pytest.raises(UsageError, match="add sampling_rate to the config"):
        sampling_rate(mute)


def test_a_wav_holds_the_sound(tmp_path: Path) -> None:
    sound = np.stack([np.linspace(-1, 1, 101), np.zeros(101)]).astype(np.float32)
    write_sound(tmp_path / "a.wav", sound, 8000)
    rate, found = wavfile.read(tmp_path / "a.wav")
    assert (rate, found.shape) == (8000, (101, 2))
    np.testing.assert_allclose(found.T / 32767, sound, atol=1e-4)


def test_all_files_of_a_video_with_sound_are_written_once(tmp_path: Path) -> None:
    shown = frames(5)
    drawn = Drawn(sheet_of(shown), tuple(shown), 8.0, np.zeros((1, 800), np.float32), 8000)
    save_drawn(drawn, tmp_path / "00003.png", {"seed": 3})
    names = {path.name for path in tmp_path.iterdir()}
    assert names - {"00003.mp4"} == {"00003.png", "00003.wav"}
    assert ("00003.mp4" in names) == (lacks_encoder() is None)
    assert told_by(tmp_path / "00003.png") == {"seed": 3, "frames": 5}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    save_drawn(drawn, tmp_path / "00003.png", {"seed": 4})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(lacks_encoder() is not None, reason="no encoder of videos is installed")
def test_an_mp4_has_the_frames(tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio.v2")
    write_video(tmp_path / "a.mp4", frames(6), 8.0)
    reader = imageio.get_reader(tmp_path / "a.mp4")
    assert (reader.get_meta_data()["fps"], reader.get_meta_data()["size"]) == (8.0, (24, 16))
    assert sum(1 for _ in reader) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
