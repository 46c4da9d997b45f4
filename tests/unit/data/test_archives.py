"""What can be read of archives that are damaged, cut short, joined, or none: files in order, and every damage."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ppcl.data.archives import Damage, Member, read_members

SAMPLES, SIZE = 5, 3000
NAMES = [f"{number:04d}.{suffix}" for number in range(SAMPLES) for suffix in ("png", "txt")]


def content_of(name: str) -> bytes:
    number = int(name[:4])
    return np.random.default_rng(number).bytes(SIZE) if name.endswith("png") else f"a {number}".encode()


def archive(names: list[str] = NAMES, kind: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as writer:
        for name in names:
            content = content_of(name)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            writer.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


WHOLE = archive()
HEADERS = [
    member.offset
    for member in tarfile.open(fileobj=io.BytesIO(WHOLE))  # noqa: SIM115 - nothing is open
]


def flipped(position: int) -> bytes:
    return WHOLE[:position] + bytes([WHOLE[position] ^ 0xFF]) + WHOLE[position + 1 :]


def read(tmp_path: Path, content: bytes) -> tuple[list[str], list[str]]:
    """Names of the files that are read, each of which is whole, and what is said of damages."""
    path = tmp_path / "shard.tar"
    path.write_bytes(content)
    found = list(read_members(path))
    files = [item for item in found if isinstance(item, Member)]
    assert all(file.content == content_of(file.name) for file in files)
    damages = [item.why for item in found if isinstance(item, Damage)]
    names = [item.name for item in read_members(path, contents=False) if isinstance(item, Member)]
    assert {file.name for file in files} <= {*names}
    return [file.name for file in files], damages


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("packed", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_a_whole_archive_has_all_files_and_no_damage(tmp_path: Path, kind: int, packed: Callable) -> None:
    assert read(tmp_path, packed(archive(kind=kind))) == (NAMES, [])


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_a_damaged_header_loses_one_file(tmp_path: Path, number: int) -> None:
    names, damages = read(tmp_path, flipped(HEADERS[number] + 2))
    assert names == [name for name in NAMES if name != NAMES[number]]
    following = f"went on at byte {HEADERS[number + 1]:,}" if number + 1 < len(NAMES) else "no file follows"
    (told,) = damages
    assert f"damaged {'at' if number + 1 < len(NAMES) else 'from'} byte {HEADERS[number]:,}" in told
    assert following in told


@pytest.mark.parametrize("length", [512, 4096])
def test_zeros_over_a_header_are_no_end(tmp_path: Path, length: int) -> None:
    names, damages = read(tmp_path, WHOLE[: HEADERS[2]] + bytes(length) + WHOLE[HEADERS[2] + length :])
    assert names[:2] == NAMES[:2]
    assert names[-4:] == NAMES[-4:]
    assert "damaged at byte" in damages[0]


def test_bytes_that_are_gone_lose_the_file_that_they_are_of(tmp_path: Path) -> None:
    """The headers behind them are at no multiple of 512, and the first is within the file that lacks bytes."""
    names, damages = read(tmp_path, WHOLE[: HEADERS[4] + 700] + WHOLE[HEADERS[4] + 1400 :])
    assert names == [name for name in NAMES if name != NAMES[4]]
    assert damages[0].endswith(f"; {NAMES[4]} is not whole")


@pytest.mark.parametrize("where", ["header", "content", "padding", "border", "end"])
def test_a_cut_archive_gives_what_is_before_the_cut_and_says_so(tmp_path: Path, where: str) -> None:
    at = {
        "header": HEADERS[4] + 100, "content": HEADERS[4] + 1000, "padding": HEADERS[5] - 10,
        "border": HEADERS[5], "end": HEADERS[-1] + 1024,
    }[where]  # fmt: skip
    names, damages = read(tmp_path, WHOLE[:at])
    assert names == NAMES[: {"header": 4, "content": 4, "padding": 5, "border": 5, "end": len(NAMES)}[where]]
    assert [damage.startswith("cut short") for damage in damages] == [True]
    assert ("0002.png is not whole" in damages[0]) == (where == "content")


@pytest.mark.parametrize("packed", [gzip.compress, lzma.compress])
def test_a_compressed_archive_that_is_cut_gives_what_decompresses(tmp_path: Path, packed: Callable) -> None:
    content = packed(WHOLE)
    names, damages = read(tmp_path, content[: 2 * len(content) // 3])
    assert 2 <= len(names) < len(NAMES)
    assert names == NAMES[: len(names)]
    assert "cut short" in damages[0]


def test_two_archives_in_a_file_are_read_one_after_the_other(tmp_path: Path) -> None:
    assert read(tmp_path, WHOLE + archive(NAMES[:2])) == (NAMES + NAMES[:2], [])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"no archive" * 200, "it is no tar archive"),
        (WHOLE + b"garbage" * 100, "damaged from byte"),
        (gzip.compress(b"", mtime=0)[:5], "cut short"),
    ],
)
def test_what_is_no_archive_is_said(tmp_path: Path, content: bytes, said: str) -> None:
    _, damages = read(tmp_path, content)
    assert [said in damage for damage in damages] == [True]


def test_a_file_that_does_not_open_is_said(tmp_path: Path) -> None:
    assert [*read_members(tmp_path)] == [Damage("it cannot be read: Is a directory")]


def test_a_size_below_zero_ends(tmp_path: Path) -> None:
    """`tarfile` would read the same header again and again."""
    header = bytearray(WHOLE[HEADERS[1] : HEADERS[1] + 512])
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    names, damages = read(tmp_path, WHOLE[: HEADERS[1]] + bytes(header) + WHOLE[HEADERS[1] + 512 :])
    assert names == [name for name in NAMES if name != NAMES[1]]
    assert len(damages) == 1
