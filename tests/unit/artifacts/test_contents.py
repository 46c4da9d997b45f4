"""Digests of whole files: what changes them, what is remembered, and which numbers are refused."""

import json
import os
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from ppcl.artifacts import contents
from ppcl.artifacts.contents import digests
from ppcl.errors import UsageError

QUIET = Console(quiet=True)


@pytest.fixture
def later(monkeypatch):
    """The clock of a command that comes long after the files were written."""
    now = time.time_ns
    monkeypatch.setattr(contents.time, "time_ns", lambda: now() + 10_000_000_000)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(contents, "_PIECE", 1 << 10)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("place", [0, 1023, 1024, 2_500, 4_999])
def test_every_byte_counts(tmp_path, place):
    file, content = tmp_path / "a.json", bytearray(os.urandom(5_000))
    file.write_bytes(content)
    (before,) = digests([file], tmp_path / "memory", QUIET)
    content[place] ^= 1
    file.write_bytes(content)
    assert digests([file], tmp_path / "memory", QUIET) != [before]


@pytest.mark.usefixtures("later")
def test_a_file_is_read_once_under_all_its_names(tmp_path, monkeypatch):
    file, link, memory = tmp_path / "a.bin.json", tmp_path / "link.json", tmp_path / "memory"
    file.write_bytes(b"content")
    link.symlink_to(file)
    found = digests([file, link], memory, QUIET)
    assert found[0] == found[1]
    monkeypatch.setattr(contents, "_piece", None)  # reading fails
    assert digests([link, file], memory, QUIET) == found


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("spoilt", ["", "{", "[]", '{"digest": 1}', '{"digest": "0"}'])
def test_a_spoilt_memory_is_made_again(tmp_path, spoilt):
    file, memory = tmp_path / "a.json", tmp_path / "memory"
    file.write_bytes(b"content")
    expected = digests([file], memory, QUIET)
    (record,) = memory.glob("*.json")
    good = record.read_text()
    record.write_text(spoilt)
    assert digests([file], memory, QUIET) == expected
    assert record.read_text() == good


@pytest.mark.usefixtures("later")
def test_a_file_of_the_same_size_and_time_is_another(tmp_path):
    """A copy that keeps the time of change, as `cp -p` does, has another time of its entry in the file system."""
    file, memory = tmp_path / "a.json", tmp_path / "memory"
    file.write_bytes(b"content 1")
    os.utime(file, ns=(1, 1))
    before = digests([file], memory, QUIET)
    time.sleep(0.02)  # longer than the clock of a file system takes to advance
    file.write_bytes(b"content 2")
    os.utime(file, ns=(1, 1))
    assert digests([file], memory, QUIET) != before


def test_what_was_written_just_now_is_not_remembered(tmp_path):
    (tmp_path / "a.json").write_bytes(b"content")
    digests([tmp_path / "a.json"], tmp_path / "memory", QUIET)
    assert not [*tmp_path.glob("memory/*.json")]


@pytest.mark.usefixtures("later")
def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path):
    (tmp_path / "a.json").write_bytes(b"content")
    (tmp_path / "memory").write_text("no folder")
    assert digests([tmp_path / "a.json"], tmp_path / "memory" / "deep", QUIET)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"none\.bin does not exist"):
        digests([tmp_path / "none.bin"], tmp_path, QUIET)


@pytest.mark.usefixtures("small_pieces", "later")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("place", [0, 700, -1])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_weight_that_is_not_finite_is_named(tmp_path, value, dtype, place, suffix):
    state = {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(1500), "c": torch.ones(7, dtype=dtype)}
    state["b"] = state["b"].to(dtype)
    file, memory = tmp_path / f"x.{suffix}", tmp_path / "memory"
    save = save_file if suffix == "safetensors" else torch.save
    save(state, file)
    digests([file], tmp_path / "other", QUIET)
    state["b"][place] = value
    save(state, file)
    for _ in range(2):  # it is not remembered as good
        with pytest.raises(UsageError, match=rf"x\.{suffix} has NaN or infinite numbers in b: "):
            digests([file], memory, QUIET)
    assert not [*memory.glob("*.json")]


@pytest.mark.usefixtures("small_pieces")
def test_large_numbers_are_finite(tmp_path):
    """Their sum is not."""
    save_file({"a": torch.full((2000,), 3e38)}, tmp_path / "x.safetensors")
    assert digests([tmp_path / "x.safetensors"], tmp_path, QUIET)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("shift", range(4))
def test_numbers_that_are_not_aligned_are_checked(tmp_path, shift):
    """A header of any length is allowed, and a number may lie on two pieces."""
    body = torch.ones(1000)
    body[254:258] = torch.nan
    header = json.dumps({"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode() + b" " * shift
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + body.numpy().tobytes())
    with pytest.raises(UsageError, match="in a: "):
        digests([file], tmp_path, QUIET)
