"""Probe, detect, generate and evaluate on two processes over gloo: each does half, and the results are those of one.

Pictures are the same bit for bit, as batches and seeds are. Probes and similarities are sums of float64 in another
order, which was seen to change a probe by up to 4e-9 of its size, and a similarity by up to 2e-9.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import digests, launch, modified, succeed, two_ranks
from PIL import Image
from safetensors.torch import load_file

from ppcl.artifacts.files import read_json, write_json

STAGES = "stages=[probe,detect,generate,evaluate]"
TOLERANCE, SMALLEST = 1e-6, 1e-8  # of a tensor's norm or of a number, and of a number near 0


@pytest.fixture(scope="module")
def options(settings: list[str]) -> list[str]:
    """Four batches of pictures. Batches that fit the probes do not divide by two."""
    sizes = ["probe.num_batches=3", "probe.num_heldout_batches=2", "method.num_samples=12", "generate.batch_size=3"]
    return [*settings, *sizes, "generate.variants=[teacher,removed]", "name=all"]


@pytest.fixture(scope="module")
def single(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("single")
    succeed(*options, STAGES, f"paths.runs_dir={runs}")
    return runs


@pytest.fixture(scope="module")
def shared(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The same on two ranks, and what they printed."""
    runs = tmp_path_factory.mktemp("shared")
    return runs, launch(2, *options, STAGES, f"paths.runs_dir={runs}", "strategy=ddp")


def content(runs: Path, pattern: str) -> Any:
    (path,) = runs.glob(pattern)
    return json.loads(path.read_text())


def assert_near(found: Any, expected: Any) -> None:
    """Assert that two JSON documents are the same but for `TOLERANCE`."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_near(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_near(ours, theirs)
    else:
        near = pytest.approx(expected, rel=TOLERANCE, abs=SMALLEST) if isinstance(expected, float) else expected
        assert found == near


def assert_same_results(found: Path, expected: Path) -> None:
    """Assert that two runs have the same files, and the same in them but for latencies and `TOLERANCE`."""
    ours, theirs = digests(found), digests(expected)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("all/images/") for name in ours)
    for name in ours:
        if name.startswith("all/images/"):  # pictures, with what their text says, and their latents
            assert ours[name] == theirs[name], name
        elif name.startswith("cache/probes/") and name.endswith(".safetensors"):
            probes = load_file(found / name), load_file(expected / name)
            for key, value in probes[1].items():
                assert (probes[0][key] - value).norm() <= TOLERANCE * value.norm(), (name, key)
        elif name.endswith(".json") and "versions" not in name:
            both = [read_json(runs / name, "The record") for runs in (found, expected)]
            if name.startswith("all/scores/"):
                assert all(each.pop("latency_ms") > 0 for each in both)
            assert_near(*both)


def test_two_ranks_find_draw_and_measure_what_one_does(single: Path, shared: tuple[Path, str]) -> None:
    assert_same_results(shared[0], single)
    plan = "all/plan/plan.json"
    assert content(shared[0], plan)["intervals"] == content(single, plan)["intervals"] != {}


def test_each_rank_does_half(shared: tuple[Path, str]) -> None:
    _, out = shared
    assert "batches fitted: 3 (1 to 2 by each of 2 ranks)" in out
    assert "calibration batches: 6 (3 by each of 2 ranks)" in out
    for name in ("teacher", "removed"):
        assert f"{name}: 12 of 12 pictures drawn (6 by each of 2 ranks)" in out
    assert "held-out samples: 64 (32 by each of 2 ranks)" in out
    assert "variants scored: 2 (1 by each of 2 ranks)" in out
    assert out.count("probe  wrote") == 1  # one of the two speaks


def test_two_ranks_remove_the_same_blocks_one_by_one(options: list[str], tmp_path: Path) -> None:
    """Of three batches one rank measures two and the other one."""
    command = [*options, "stages=[detect]", "method=greedy", "method.params=null", "method.num_remove=2"]
    command.append("method.settings.batches=3")
    succeed(*command, f"paths.runs_dir={tmp_path / 'single'}")
    out = launch(2, *command, f"paths.runs_dir={tmp_path / 'shared'}", "strategy=ddp")
    found, expected = (content(tmp_path / runs, "all/plan/plan.json") for runs in ("shared", "single"))
    assert_near(found["scores"], expected["scores"])
    assert found["intervals"] == expected["intervals"] != {}
    assert out.count("removed transformer_blocks") == 2  # one of the two speaks


@pytest.fixture(scope="module")
def compared(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, Path]:
    """Another command, and the folders that it made in one process and on two ranks.

    One batch fits all probes, so that one rank has none, and each trains half of the probes further.
    """
    given = ["probe.num_batches=1", "probe.train_steps=2", "method=cka_sensitivity", "method.num_remove=2"]
    command, runs = [*options, *given, "benchmark=fidelity"], tmp_path_factory.mktemp("compared")
    succeed(*command, STAGES, f"paths.runs_dir={runs / 'single'}")
    outcome = two_ranks(*command, STAGES, f"paths.runs_dir={runs / 'shared'}", "strategy=fsdp")
    assert outcome.returncode == 0, outcome.stderr
    assert "batches fitted: 1 (0 to 1 by each of 2 ranks)" in outcome.stdout
    return command, runs / "single", runs / "shared"


def test_two_ranks_train_probes_and_compare_as_one_does(compared: tuple[list[str], Path, Path]) -> None:
    _, single, shared = compared
    assert_same_results(shared, single)


def test_missing_pictures_are_shared_and_one_rank_that_fails_ends_both(
    compared: tuple[list[str], Path, Path], tmp_path: Path
) -> None:
    """The second rank, which compares every second picture, finds one of another size."""
    command, single, _ = compared
    shutil.copytree(single, tmp_path / "runs")
    folder = tmp_path / "runs" / "all" / "images" / "captions"
    manifest = read_json(folder / "teacher" / "manifest.json", "The record")
    del manifest["files"]  # or the changed picture would be refused before
    write_json(folder / "teacher" / "manifest.json", manifest)
    before = digests(folder)
    for number in range(2, 8):  # of three batches, of which one has a picture left
        (folder / "removed" / f"{number:05d}.png").unlink()
    there = modified(folder / "removed")
    shutil.rmtree(tmp_path / "runs" / "all" / "scores")
    with Image.open(folder / "teacher" / "00001.png") as picture:
        picture.resize((8, 8)).save(folder / "teacher" / "00001.png")
    stages = ["stages=[generate,evaluate]", f"paths.runs_dir={tmp_path / 'runs'}", "strategy=ddp"]
    outcome = two_ranks(*command, *stages)
    assert "removed: 8 of 8 pictures drawn (3 to 5 by each of 2 ranks)" in outcome.stdout
    after = digests(folder)
    assert {name for name in before if after[name] != before[name]} == {"teacher/00001.png"}
    left = [str(folder / "removed" / f"{number:05d}.png") for number in range(2)]
    assert [modified(folder / "removed")[path] for path in left] == [there[path] for path in left]
    assert outcome.returncode == 2
    assert outcome.stderr.count("ppcl: ") == 1
    assert "00001.png has 32x32 pixels, and the teacher's 8x8" in outcome.stderr
    assert "Traceback" not in outcome.stderr
