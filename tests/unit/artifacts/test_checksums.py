"""Files that were changed after they were written are refused in a sentence whose remedy is a stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ppcl.artifacts.files import (
    atomic_folder,
    atomic_path,
    is_changed,
    link_or_copy,
    read_json,
    sweep,
    temporary_path,
    with_checksum,
    write_json,
)
from ppcl.artifacts.folders import check_files, check_model, list_files
from ppcl.artifacts.headers import MAKERS, Header, is_current
from ppcl.artifacts.locks import locked
from ppcl.artifacts.tensors import TensorFile, read_tensors, write_tensors
from ppcl.errors import UsageError
from ppcl.stages import STAGES

TENSORS = {
    "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "empty": torch.zeros(0, 4),
    "number": torch.tensor(2.5, dtype=torch.float64),
    "turned": torch.arange(12.0).reshape(3, 4).T,
    "mask": torch.tensor([True, False]),
}


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


# JSON


def test_json_is_read_back_without_its_checksum(tmp_path: Path) -> None:
    content = {"a": 1, "b": [0.1, None, {"c": "ü"}], "steps": {"10": 1, "2": 2}}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json", "The record") == content
    assert "crc32" in json.loads((tmp_path / "a.json").read_text())


def test_keys_that_are_numbers_or_tuples_as_values_do_not_disturb(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"by": {10: 1, 2: 2}, "pair": (1, 2)})
    assert read_json(tmp_path / "a.json", "The record") == {"by": {"10": 1, "2": 2}, "pair": [1, 2]}


def test_json_that_was_changed_names_the_stage(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"loss": 0.25})
    path.write_text(path.read_text().replace("0.25", "0.35"))
    with pytest.raises(
        UsageError, match=r"a\.json has changed since it was written: delete it and run 'stages=\[depth"
    ):
        read_json(path, "The plug", "depth")
    assert read_json(path, "The plug", "depth", edited=True) == {"loss": 0.35}  # a file that users edit


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe", b"[1]", b"[" * 100_000])
def test_json_that_does_not_read_names_the_stage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"delete it and run 'stages=\[depth\]' again"):
        read_json(tmp_path / "a.json", "The plug", "depth")


def test_json_of_earlier_versions_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json", "The record") == {"a": 1}


def test_every_format_names_a_stage() -> None:
    assert {*MAKERS.values()} <= {*STAGES}
    assert Header("ppcl.plug", {}).stage == "depth"


def test_a_record_counts_only_with_its_files(tmp_path: Path) -> None:
    header, record, tensors = Header("ppcl.plug", {"a": 1}), tmp_path / "a.json", tmp_path / "a.safetensors"
    write_json(record, header.to_json())
    assert is_current(record, header)
    assert not is_current(record, header, files=[tensors])
    tensors.touch()
    assert is_current(record, header, files=[tensors])


def test_a_changed_configuration_is_noticed() -> None:
    text = with_checksum("a: 1\nname: ü\n")
    assert not is_changed(text)
    assert is_changed(text.replace(": 1", ": 2"))
    assert is_changed(text[:-3])
    assert not is_changed("a: 2\n")  # of an earlier version


# Tensors


def test_tensors_are_read_back_and_files_are_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tensors(tmp_path / name, TENSORS, {"fingerprint": "f", "unit": "ü", "z": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found, metadata = read_tensors(tmp_path / "a", "depth", "f")
    assert metadata == {"fingerprint": "f", "unit": "ü", "z": "1"}
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items())


def test_a_flipped_byte_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    """Except in the name of the checksums, without which the file counts as one of an earlier version."""
    path, tensors = tmp_path / "a.safetensors", {"a": torch.arange(4.0), "b": torch.ones(3)}
    write_tensors(path, tensors, {"fingerprint": "f"})
    whole = path.read_bytes()
    named = range(whole.index(b"crc32"), whole.index(b"crc32") + len(b"crc32"))
    unread = [place for place in range(8, len(whole)) if whole[place : place + 1] == b" " or place in named]
    for place in sorted({*range(8, len(whole))} - {*unread}):
        path.write_bytes(whole)
        flip(path, place)
        try:
            found, metadata = read_tensors(path, "depth", "f")
        except UsageError as error:
            assert "run 'stages=[depth]' again" in str(error)  # noqa: PT017 - or what was read is right
        else:
            assert metadata == {"fingerprint": "f"}, place
            assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_only_the_tensor_that_is_read_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(4), "b": torch.zeros(4)}, {})
    flip(path, len(path.read_bytes()) - 1)
    file = TensorFile(path, "cache")
    assert torch.equal(file.get_tensor("a"), torch.zeros(4))
    with pytest.raises(UsageError, match=r"a\.safetensors has changed since it was written: delete it and run"):
        file.get_tensor("b")
    with pytest.raises(UsageError, match="has changed"):
        file.get_tensor("none")


def test_tensors_of_other_settings_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"a": torch.zeros(1)}, {"fingerprint": "mine"})
    with pytest.raises(UsageError, match="belongs to a run with other settings"):
        TensorFile(tmp_path / "a", "boundaries", "yours")


def test_tensors_of_earlier_versions_are_read_as_they_are(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a", {"unit": "b"})
    assert torch.equal(read_tensors(tmp_path / "a", "cache", "f")[0]["a"], torch.ones(2))


# Folders of models and of pictures


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "transformer").mkdir(parents=True)
    save_file({"a": torch.ones(8)}, folder / "transformer" / "model.safetensors")
    (folder / "transformer" / "config.json").write_text("{}")
    (folder / "README.md").write_text("a card")
    return folder


@pytest.mark.parametrize("damage", ["cut", "flipped", "deleted", "emptied"])
@pytest.mark.parametrize("file", ["transformer/model.safetensors", "transformer/config.json"])
def test_a_model_with_a_damaged_file_is_refused(model: Path, file: str, damage: str) -> None:
    record = json.loads(json.dumps(list_files(model)))
    check_model(model, record, "export")
    path = model / file
    whole = path.read_bytes()
    if damage == "flipped":
        flip(path, -1)
    elif damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(whole[: len(whole) // 2 if damage == "cut" else 0])
    with pytest.raises(UsageError, match=rf"{file} .*: delete {model} and run 'stages=\[export\]' again"):
        check_model(model, record, "export")


def test_the_card_may_change_and_files_may_be_added(model: Path) -> None:
    record = list_files(model)
    (model / "README.md").write_text("another card")
    (model / "more.txt").write_text("more")
    check_files(model, record, "no remedy")


def test_a_model_of_earlier_versions_needs_weights_that_read(model: Path) -> None:
    check_model(model, {}, "export")
    weights = model / "transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UsageError, match="truncated"):
        check_model(model, {}, "export")
    weights.unlink()
    with pytest.raises(UsageError, match="holds no weights"):
        check_model(model, {}, "export")


# Temporary files


def dead() -> int:
    """The number of a process that has ended."""
    return int(subprocess.check_output([sys.executable, "-c", "import os; print(os.getpid())"]))


def test_only_what_a_dead_process_has_left_is_swept(tmp_path: Path) -> None:
    live, number = temporary_path(tmp_path / "a.json"), str(os.getpid())
    killed = live.with_name(live.name.replace(f".{number}.", f".{dead()}."))
    earlier = tmp_path / f".a.{dead()}.tmp"
    elsewhere, long_ago = tmp_path / ".a.json.other-host.7.0.tmp", tmp_path / ".b.json.other-host.7.0.tmp"
    for path in (live, killed, earlier, elsewhere, long_ago, tmp_path / "a.tmp", tmp_path / ".a.tmp"):
        path.touch()
    os.utime(long_ago, (time.time() - 3 * 86400,) * 2)
    folder = tmp_path / "below" / killed.name
    folder.mkdir(parents=True)
    (folder / "model").touch()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {live.name, elsewhere.name, "a.tmp", ".a.tmp", "below"}
    assert folder.exists()
    sweep(tmp_path, deep=True)
    assert not folder.exists()


def test_two_writers_have_files_of_their_own(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as first, atomic_path(tmp_path / "a") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with atomic_folder(tmp_path / "b") as first, atomic_folder(tmp_path / "b") as second:
        (first / "x").touch()
        (second / "y").touch()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["x"]  # the last to end
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_link_replaces_what_is_there_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("new")
    (tmp_path / "target").write_text("old")
    for _ in range(2):  # the second time it is the same file already
        link_or_copy(tmp_path / "source", tmp_path / "target")
        assert (tmp_path / "target").read_text() == "new"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


# Locks


def test_a_lock_is_held_by_one_and_says_by_whom(tmp_path: Path) -> None:
    path = tmp_path / ".depth.lock"
    with locked(path, "'stages=[depth]' is being run in runs/a", "wait"):
        said = rf"being run in runs/a by process {os.getpid()} on .*: wait\."
        with pytest.raises(UsageError, match=said), locked(path, "'stages=[depth]' is being run in runs/a", "wait"):
            pass
    assert not path.exists()
    path.write_text("process 1 on a machine that was switched off")
    with locked(path, "a", "b"):
        pass
    assert not path.exists()
