"""One data set with everything that users' data have had wrong: what can be used is cached once, all else is listed."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Outcome, ppcl, succeed
from PIL import Image
from safetensors.torch import load_file

from ppcl.data.cached import LATENTS, part_record, read_entries, unit_record
from ppcl.errors import UsageError

PLAIN = "samples"


READ = ["100", "101", "103", "104", "105", "200", "201", "202", "203"]  # of shards that are damaged or cut


def stored(picture: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **settings)
    return buffer.getvalue()


def halves(size: tuple[int, int] = (32, 32), mode: str = "RGB", left: object = "black") -> Image.Image:
    """A white picture whose left half has another colour."""
    picture = Image.new(mode, size, 0 if mode == "CMYK" else "white")
    picture.paste(left, (0, 0, size[0] // 2, size[1]))
    return picture


def turned() -> bytes:
    """A picture that is wide as it is stored, and tall as it is to be seen, with black above."""
    exif = Image.Exif()
    exif[274] = 6
    return stored(halves((44, 32)), exif=exif)


def clear() -> Image.Image:
    """Its left half is black, and its right one red, but transparent."""
    picture = halves(mode="RGBA")
    picture.paste((255, 0, 0, 0), (16, 0, 32, 32))
    return picture


GREYS = np.asarray(halves().convert("L")).astype(np.uint16)
TALL = Image.new("RGB", (32, 44), "white")
TALL.paste("black", (0, 0, 32, 22))
GOOD = {
    "black-and-white": stored(halves()),
    "clear": stored(clear()),
    "cmyk": stored(halves(mode="CMYK", left=(0, 0, 0, 255)), "TIFF"),
    "deep": stored(Image.fromarray(GREYS * 257)),
    "tall": stored(TALL),
    "turned": turned(),
}
SUFFIXES = {"cmyk": "tiff", "float": "tiff"}
BAD = {
    "float": (stored(Image.fromarray(GREYS.astype(np.float32)), "TIFF"), b'{"caption": "a"}', "holds floats"),
    "thin": (stored(Image.new("RGB", (3000, 1))), b'{"caption": "a"}', "3000x1 pixels: any shape of data.aspects"),
    "null": (stored(halves()), b'{"caption": null}', "no caption in data.captions=[caption]; it has caption"),
    "nothing": (stored(halves()), b"null", "holds no object with named values"),
    "object": (stored(halves()), b'{"caption": {"en": "a"}}', "its caption is an object with named values"),
    "latin": (stored(halves()), '{"caption": "café"}'.encode("cp1252"), "its .json is not UTF-8"),
    "broken": (stored(halves())[:60], b'{"caption": "a"}', "does not decode"),
    "\x1b]0;owned\x07\x1b[2J": (b"", b'{"caption": "a"}', "does not decode"),
}


def shard(path: Path, samples: dict[str, tuple[str, bytes, bytes]]) -> Path:
    """Write a shard of pictures and JSON files. `samples`: for each key the picture's suffix, the picture, the JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as writer:
        for key, (suffix, picture, facts) in samples.items():
            for name, content in ((f"{key}.{suffix}", picture), (f"{key}.json", facts)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                writer.addfile(info, io.BytesIO(content))
    return path


def numbered(first: int, count: int = 6) -> dict[str, tuple[str, bytes, bytes]]:
    """Samples whose pictures are noise, so that a compressed shard does not become short."""
    noise = np.random.default_rng(first).integers(0, 256, (count, 32, 32, 3), np.uint8)
    return {
        f"{first + number}": ("png", stored(Image.fromarray(pixels)), b'{"caption": "a"}')
        for number, pixels in enumerate(noise)
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    good = {key: (SUFFIXES.get(key, "png"), picture, b'{"caption": ["a", "b"]}') for key, picture in GOOD.items()}
    bad = {key: (SUFFIXES.get(key, "png"), picture, facts) for key, (picture, facts, _) in BAD.items()}
    shard(folder / f"{PLAIN}.tar", good | bad)
    damaged = shard(folder / "damaged.tar", numbered(100))
    with tarfile.open(damaged) as archive:
        at = archive.getmember("102.png").offset
    content = bytearray(damaged.read_bytes())
    content[at] ^= 0xFF
    damaged.write_bytes(content)
    cut = shard(folder / "cut.tar", numbered(200))
    with tarfile.open(cut) as archive:
        at = archive.getmember("204.png").offset_data
    cut.write_bytes(cut.read_bytes()[: at + 100])
    packed = shard(folder / "packed.tar", numbered(300))
    content = gzip.compress(packed.read_bytes())
    packed.write_bytes(content[: len(content) // 2])
    return folder


@pytest.fixture(scope="module")
def command(settings: list[str]) -> list[str]:
    data = ["data=webdataset", "data.aspects=['1:1','8:11']", "data.captions=[caption]", "data.encode_batch_size=4"]
    return [*settings, *data, "stages=[cache]", "name=bad"]


@pytest.fixture(scope="module")
def outcome(command: list[str], shards: Path) -> Outcome:
    return succeed(*command, f"data.path={shards}", f"paths.runs_dir={shards / 'runs'}")


def cache_of(runs: Path) -> Path:
    (folder,) = (runs / "cache" / "data").iterdir()
    return folder


def skipped(folder: Path, unit: str) -> dict[str, str]:
    items = json.loads((folder / unit_record(unit)).read_text())["skipped"]
    assert len({item["key"] for item in items}) == len(items)
    return {item["key"]: item["why"] for item in items}


def test_every_good_sample_is_cached_once_and_every_bad_one_is_listed(outcome: Outcome, shards: Path) -> None:
    folder = cache_of(shards / "runs")
    keys = [entry.key for entry in read_entries(folder)]
    gunzipped = [key for key in keys if key.startswith("3")]
    assert gunzipped == [f"{300 + number}" for number in range(len(gunzipped))] != []
    assert sorted(keys) == sorted([*GOOD, *READ, *gunzipped])
    reasons = skipped(folder, f"{PLAIN}.tar")
    assert reasons.keys() == BAD.keys()
    assert all(said in reasons[key] for key, (_, _, said) in BAD.items())
    assert skipped(folder, "damaged.tar").keys() == {"102", "damaged.tar"}
    assert "damaged at byte" in skipped(folder, "damaged.tar")["damaged.tar"]
    assert "cut short" in skipped(folder, "cut.tar")["cut.tar"]
    assert "cut short" in skipped(folder, "packed.tar")["packed.tar"]
    left_out = sum(len(skipped(folder, f"{name}.tar")) for name in (PLAIN, "damaged", "cut", "packed"))
    assert f"{len(keys)} samples of 4 units cached, {left_out} left out" in outcome.out


def test_nothing_of_a_name_reaches_the_terminal(outcome: Outcome, command: list[str], tmp_path: Path) -> None:
    assert "\x1b" not in outcome.out + outcome.err
    name = "\x1b[2Jowned\n\x9b1m"
    shard(tmp_path / "0.tar", {name: ("png", b"", b'{"caption": "a"}'), **numbered(0, 1)})
    out = succeed(*command, f"data.path={tmp_path}", f"paths.runs_dir={tmp_path}").out
    assert r"left out \x1b[2Jowned\n\x9b1m: its picture does not decode" in out


def test_pictures_of_every_mode_are_what_they_show(outcome: Outcome, shards: Path) -> None:
    found = {}
    for entry in read_entries(cache_of(shards / "runs")):
        found[entry.key] = load_file(entry.part)[f"{entry.number:03d}.{LATENTS}"], entry.size
    for one, other in (
        ("clear", "black-and-white"),
        ("cmyk", "black-and-white"),
        ("deep", "black-and-white"),
        ("turned", "tall"),
    ):
        torch.testing.assert_close(found[one], found[other], rtol=0, atol=1e-5)
    assert found["tall"][1] != found["deep"][1]


def test_a_second_run_says_what_there_is(outcome: Outcome, command: list[str], shards: Path) -> None:
    (told,) = re.findall(r"\d+ samples of 4 units cached, \d+ left out", outcome.out)
    again = succeed(*command, f"data.path={shards}", f"paths.runs_dir={shards / 'runs'}").out
    assert re.search(rf"reused .*: {told}", again)


def test_shards_of_one_name_are_all_cached(command: list[str], tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        shard(tmp_path / name / "0.tar", numbered(10 * number, 3))
    out = succeed(*command, f"data.path='{tmp_path}/{{a,b}}/0.tar'", f"paths.runs_dir={tmp_path}").out
    assert "6 samples of 2 units cached, 0 left out" in out
    keys = [entry.key for entry in read_entries(cache_of(tmp_path))]
    assert sorted(keys) == ["0", "1", "10", "11", "12", "2"]


def test_parts_beyond_a_thousand_are_read(outcome: Outcome, shards: Path, tmp_path: Path) -> None:
    """In the order in which they were written; a unit's own name may end like that of a part."""
    unit = "pictures-123"
    for number in range(1002):
        samples = [{"key": f"{number}", "size": [8, 8]}] if number >= 998 else []
        (tmp_path / part_record(unit, number)).write_text(json.dumps({"samples": samples, "skipped": []}))
        part = next(cache_of(shards / "runs").glob("*-000.safetensors"))
        (tmp_path / part_record(unit, number)).with_suffix(".safetensors").symlink_to(part)
    (tmp_path / unit_record(unit)).write_text(json.dumps({"unit": unit, "samples": 4, "skipped": []}))
    assert [entry.key for entry in read_entries(tmp_path)] == ["998", "999", "1000", "1001"]
    (tmp_path / part_record(unit, 1000)).unlink()
    with pytest.raises(UsageError, match=f"lacks 1 samples of {unit}: delete"):
        read_entries(tmp_path)


def test_a_part_that_was_deleted_is_made_again_as_the_error_says(command: list[str], tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", numbered(0, 4))
    arguments = [*command, f"data.path={tmp_path}", f"paths.runs_dir={tmp_path}", "data.samples_per_file=2"]
    succeed(*arguments)
    folder = cache_of(tmp_path)
    (folder / part_record("0.tar", 0)).unlink()
    with pytest.raises(UsageError, match=r"lacks 2 samples of 0\.tar: delete") as error:
        read_entries(folder)
    Path(re.search(r"delete (\S+), and run", str(error.value))[1]).unlink()
    assert "4 samples of 1 unit cached" in succeed(*arguments).out
    assert len(read_entries(folder)) == 4


def no_captions(folder: Path) -> Callable[[], None]:
    table = folder / "metadata.csv"
    table.write_text("file_name,description\n" + "".join(f"{number}.png,a\n" for number in range(4)))
    return lambda: table.write_text("file_name,caption\n" + "".join(f"{number}.png,a\n" for number in range(4)))


def no_pictures(folder: Path) -> Callable[[], None]:
    """The table stays as it is, and so does the fingerprint of the cache."""
    (folder / "metadata.csv").write_text("file_name,caption\n" + "".join(f"{number}.png,a\n" for number in range(4)))
    for number in range(4):
        (folder / f"{number}.png").rename(folder / f"{number}.bak")
    return lambda: [(folder / f"{number}.bak").rename(folder / f"{number}.png") for number in range(4)]  # type: ignore


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_captions, "no caption in data.captions=[caption]; it has file_name, description"),
        (no_pictures, "its file cannot be read: No such file or directory"),
    ],
)
def test_nothing_usable_is_an_error_and_the_same_command_works_once_it_is_mended(
    command: list[str], tmp_path: Path, spoil: Callable[[Path], Callable[[], None]], said: str
) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(stored(halves()))
    mend = spoil(tmp_path)
    arguments = [*command, "data=folder", f"data.path={tmp_path}", f"paths.runs_dir={tmp_path / 'runs'}"]
    for _ in range(2):
        outcome = ppcl(*arguments)
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1
        assert (
            f"data.path={tmp_path} has no sample that can be used: 4 are left out, 4 of them for this reason: {said}"
            in outcome.err
        )
    mend()
    assert "4 samples of 1 unit cached, 0 left out" in succeed(*arguments).out
