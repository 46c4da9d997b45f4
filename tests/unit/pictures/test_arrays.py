"""An .npz holds the pictures that it was made of, as NumPy reads them, and nothing is written of what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ppcl.errors import UsageError
from ppcl.pictures.arrays import npz_command, read_npz

RNG = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.png", "c.PNG", "grid.png"):
        Image.fromarray(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text("{}")
    return tmp_path


def test_an_array_has_the_pictures_sorted_by_name(folder: Path) -> None:
    target = folder / "out" / "all.npz"
    assert npz_command([str(folder), str(target)]) == f"wrote {target} with 3 pictures"
    expected = [np.asarray(Image.open(folder / name)) for name in ("a.png", "b.png", "c.PNG")]
    with np.load(target) as found:
        assert found.files == ["arr_0"]
        assert found["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(found["arr_0"], expected)
    np.testing.assert_array_equal([np.asarray(picture) for picture in read_npz(target, "")], expected)


def test_what_numpy_writes_is_read(tmp_path: Path) -> None:
    pictures = RNG.integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "them.npz", pictures, mu=np.zeros(3))
        found = [np.asarray(picture) for picture in read_npz(tmp_path / "them.npz", "")]
        np.testing.assert_array_equal(found, pictures)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{folder}"], "ppcl npz FOLDER OUT.npz"),
        (["{folder}", "{folder}/out"], "must end in .npz"),
        (["{folder}", "{folder}/there.npz"], "there.npz exists: delete it"),
        (["{folder}/none", "{folder}/x.npz"], "none is no folder"),
        (["{folder}/empty", "{folder}/x.npz"], "empty holds no picture"),
        (["{folder}/sizes", "{folder}/x.npz"], r"b.png has 2x3 pixels and \S+a.png 3x3"),
        (["{folder}/damaged", "{folder}/x.npz"], "a.png cannot be used, as its picture does not decode"),
    ],
)
def test_what_makes_no_array_is_refused(folder: Path, arguments: list[str], said: str) -> None:
    (folder / "there.npz").touch()
    for name in ("empty", "sizes", "damaged"):
        (folder / name).mkdir()
    for name, size in (("a", (3, 3)), ("b", (2, 3))):
        Image.new("RGB", size).save(folder / "sizes" / f"{name}.png")
    (folder / "damaged" / "a.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=said):
        npz_command([argument.format(folder=folder) for argument in arguments])
    assert not (folder / "x.npz").exists()
    assert not [*folder.glob(".x*")]


def test_a_file_without_pictures_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "other.npz", pictures=np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "text.npz").write_text("no array")
    with pytest.raises(UsageError, match=r"^benchmark\.settings\.reference=\S+ holds arr_0 of float64 and shape"):
        [*read_npz(tmp_path / "floats.npz", "benchmark.settings.reference=")]
    for name in ("other", "text", "gone"):
        with pytest.raises(UsageError, match=r"benchmark\.settings\.reference=\S+ does not read as an \.npz"):
            [*read_npz(tmp_path / f"{name}.npz", "benchmark.settings.reference=")]
