"""What of a cache is trained on, and what is said of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ppcl.artifacts.headers import Header
from ppcl.config import DataConfig
from ppcl.data.cached import EMPTY, CachedStream, part_record, unit_record

SIZES = [(8, 8), (7, 9), (9, 7), (6, 10)]


def cache(folder: Path, samples: list[dict]) -> Path:
    (folder / "cache.json").write_text(json.dumps(Header("ppcl.cache", {}).to_json()))
    save_file({"prompt_embeds": torch.zeros(1, 4)}, folder / EMPTY)
    save_file({}, (folder / part_record("0.tar", 0)).with_suffix(".safetensors"))
    (folder / part_record("0.tar", 0)).write_text(json.dumps({"samples": samples, "skipped": []}))
    (folder / unit_record("0.tar")).write_text(json.dumps({"unit": "0.tar", "samples": len(samples), "skipped": []}))
    return folder


def remark_of(folder: Path, samples: list[dict], batch_size: int, family) -> tuple[str, set[str]]:
    """What is said, and the samples of two epochs."""
    config = DataConfig(name="webdataset", held_out=1e-9)
    stream = CachedStream(family, cache(folder, samples), config, 5, batch_size, held_out=False)
    return stream.remark, stream.names(range(2 * stream.steps_per_epoch))


@pytest.mark.parametrize("given", [0, 2])
def test_samples_that_fill_no_batch_are_counted_with_the_key_that_helps(tmp_path: Path, family, given: int) -> None:
    """Edits are divided by the size of every picture that they are given, too."""
    samples = [{"key": f"{number}", "size": [8, 8]} for number in range(13)]
    for number, sample in enumerate(samples):
        rare = SIZES[1 + number % 3] if number < 6 else SIZES[0]
        if given:
            sample["given"] = [SIZES[0]] * (given - 1) + [rare]
        else:
            sample["size"] = list(rare)
    remark, names = remark_of(tmp_path, samples, 3, family)
    assert remark == (
        "6 of 12 samples fill batches of 3 of one size; 6 are in no batch, as fewer than 3 have their size (fewer "
        "data.aspects help)"
    )
    assert names == {f"{number}" for number in range(6, 13)} - {"9"}  # which is held out
    assert remark_of(tmp_path, [sample | {"given": [], "size": [8, 8]} for sample in samples], 3, family)[0] == ""


def test_where_no_size_fills_a_batch_every_sample_is_used(tmp_path: Path, family) -> None:
    samples = [{"key": f"{number}", "size": list(SIZES[number % 4])} for number in range(9)]
    remark, names = remark_of(tmp_path, samples, 8, family)
    assert (remark, len(names)) == ("", 8)
