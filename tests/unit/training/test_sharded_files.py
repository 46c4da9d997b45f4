"""A checkpoint of a run folder is data: nothing in it is run."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import save

from ppcl.errors import UsageError
from ppcl.training.sharded_files import load_sharded


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint" / "sharded-00000004"
    state = {
        "weights": torch.arange(6.0).view(2, 3),
        "rate": 0.5,
        "betas": (0.9, None),
        "half": torch.ones(3).bfloat16(),
    }
    save(state, checkpoint_id=folder, no_dist=True)
    return folder


def blank():
    return {"weights": torch.zeros(2, 3), "rate": 0.0, "betas": (0.0, 0.0), "half": torch.zeros(3).bfloat16()}


def test_what_torch_writes_is_read(folder):
    state = blank()
    load_sharded(state, folder)
    assert torch.equal(state["weights"], torch.arange(6.0).view(2, 3))
    assert (state["rate"], state["betas"]) == (0.5, (0.9, None))
    assert torch.equal(state["half"], torch.ones(3).bfloat16())


def test_what_the_checkpoint_lacks_keeps_its_values(folder):
    state = blank() | {"other": torch.full((2,), 7.0)}
    with pytest.raises(UsageError, match=r"is damaged .*: delete .*checkpoint to train anew"):
        load_sharded(dict(state), folder)
    load_sharded(state, folder, partial=True)
    assert torch.equal(state["other"], torch.full((2,), 7.0))


def test_a_list_of_contents_runs_no_code(folder, tmp_path):
    for content in (Touch(tmp_path / "made"), {"state_dict_metadata": Touch(tmp_path / "made")}, print):
        (folder / ".metadata").write_bytes(pickle.dumps(content))
        with pytest.raises(UsageError, match=r"\.metadata holds .*, which could run code: it is not read; delete"):
            load_sharded(blank(), folder)
    assert not (tmp_path / "made").exists()


def test_an_entry_runs_no_code(folder, tmp_path):
    save(blank() | {"rate": Touch(tmp_path / "made")}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(UsageError, match="holds more than tensors and settings: it is not read; delete"):
        load_sharded(blank(), folder)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"\x80", None, pickle.dumps({"a": 1})])
def test_a_damaged_list_of_contents_is_one_sentence(folder, content):
    if content is None:
        (folder / ".metadata").unlink()
    else:
        (folder / ".metadata").write_bytes(content)
    with pytest.raises(
        UsageError, match=r"\.metadata (is damaged or missing|holds no list of contents).*delete"
    ) as error:
        load_sharded(blank(), folder)
    assert "\n" not in str(error.value)
