"""Students that learn from a teacher's activations on disk are those that learn beside it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import (
    DIE_AT_RENAME,
    INTERVALS,
    PLUG_NAMES,
    assert_same_tensors,
    digests,
    plug_tensors,
    ppcl,
    ppcl_process,
    succeed,
)
from safetensors.torch import load_file

from ppcl.command import prepare
from ppcl.stages.depth import run as train

FROM = "distill.from_boundaries=true"


@pytest.fixture(scope="module")
def command(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*settings, INTERVALS, "distill.steps=10", f"paths.runs_dir={tmp_path_factory.mktemp('boundaries')}"]


@dataclass
class Repeated:
    """The first `count` batches of a stream, over and over."""

    stream: Any
    count: int
    remark = ""

    def divided(self, step: int, parts: int) -> Any:
        return self.stream.divided(step % self.count, parts)


def both_ways(command: list[str]) -> Path:
    """With an online training, boundaries, and a training from them."""
    succeed(*command, "name=online", "stages=[depth]")
    outcome = succeed(*command, "name=written", "stages=[boundaries]")
    assert "MB for 26 steps" in outcome.out  # 16 of them held out
    succeed(*command, "name=offline", "stages=[depth]", FROM)
    return Path(next(a for a in reversed(command) if a.startswith("paths.runs_dir=")).partition("=")[2])


@pytest.fixture(scope="module")
def runs(command: list[str]) -> Path:
    return both_ways(command)


def folder_of(runs: Path) -> Path:
    (folder,) = (runs / "cache" / "boundaries").iterdir()
    return folder


def test_both_ways_give_the_same_students(runs: Path) -> None:
    """On one machine bit for bit: the same kernels see the same tensors."""
    assert_same_tensors(plug_tensors(runs / "offline"), plug_tensors(runs / "online"))
    losses = [
        json.loads((runs / name / "plugs" / f"{plug}.json").read_text())["losses"]
        for name in ("online", "offline")
        for plug in PLUG_NAMES
    ]
    for online, offline in zip(losses[:2], losses[2:], strict=True):
        assert online.keys() == offline.keys()
        assert offline == pytest.approx(online, rel=1e-5)


def test_both_ways_give_the_same_students_of_a_teacher_in_half_precision(command: list[str], tmp_path: Path) -> None:
    """It computes beside a training as it does alone, though students learn in mixed precision."""
    runs = both_ways([*command, "model.dtype=bfloat16", f"paths.runs_dir={tmp_path}"])
    assert_same_tensors(plug_tensors(runs / "offline"), plug_tensors(runs / "online"))
    outcome = ppcl(*command, FROM, f"distill.boundaries={folder_of(runs)}", "name=bad", "stages=[depth]")
    assert outcome.code == 2
    assert "was written with model.dtype=bfloat16, not float32: set model.dtype=bfloat16." in outcome.err


def test_intervals_train_one_by_one_without_the_teacher_and_meet(
    command: list[str], runs: Path, tmp_path: Path, teacher: Path
) -> None:
    """Where there are no weights at all, from copies of just their files, as jobs of a sweep do it."""
    arch = json.loads((teacher / "transformer" / "config.json").read_text())
    arch = {key: value for key, value in arch.items() if not key.startswith("_")}
    settings = [a for a in command if not a.startswith(("model.path", "paths.runs_dir", "model=", "model.sampling"))]
    bare = [f"++model.arch.{key}={json.dumps(value)}" for key, value in arch.items()]
    bare += ["model=qwen_image", "model.dtype=float32", f"paths.runs_dir={tmp_path}", "name=apart", FROM]
    bare += ["distill.relative_update=0.1"]  # the default goes by the size of weights, which are not there
    for name in PLUG_NAMES:
        alone = tmp_path / f"only-{name}"
        shutil.copytree(folder_of(runs), alone, ignore=lambda _, names, own=name: {*PLUG_NAMES} & {*names} - {own})
        succeed(*settings, *bare, f"distill.boundaries={alone}", f"distill.intervals=[{name}]", "stages=[depth]")
    assert_same_tensors(plug_tensors(tmp_path / "apart"), plug_tensors(runs / "online"))
    # And the run with the teacher goes on with them.
    shutil.copytree(tmp_path / "apart" / "plugs", tmp_path / "whole" / "plugs")
    small = ["width=none", "budget.params=0.8", "benchmark.latency_repeats=1"]
    succeed(*command, f"paths.runs_dir={tmp_path}", "name=whole", "stages=[plan]", *small)


def test_what_one_interval_ends_and_the_next_begins_with_is_stored_once(runs: Path) -> None:
    """By a link, so that a folder that is copied or left alone has all it needs."""
    before, after = (folder_of(runs) / name for name in PLUG_NAMES)
    for kind in ("train-0000", "train-0001", "heldout-0000"):
        end, start = before / f"{kind}-end.safetensors", after / f"{kind}-start.safetensors"
        assert end.samefile(start)
        assert {"0/outputs/image", "0/outputs/text"} <= {*load_file(end)}
        assert not {"0/kwargs/hidden_states", "0/kwargs/encoder_hidden_states"} & {
            *load_file(after / f"{kind}.safetensors")
        }


def test_intervals_are_stored_and_trained_one_at_a_time(command: list[str], runs: Path, tmp_path: Path) -> None:
    """A disk needs room for one of them, and the students are those of boundaries that were stored together."""
    own = [*command, f"paths.runs_dir={tmp_path}", "name=apart", FROM]
    for name in PLUG_NAMES:
        succeed(*own, "stages=[boundaries,depth]", f"distill.intervals=[{name}]")
        (folder,) = (path.name for path in folder_of(tmp_path).iterdir() if path.is_dir())
        assert folder == name
        shutil.rmtree(tmp_path / "cache" / "boundaries")
    assert_same_tensors(plug_tensors(tmp_path / "apart"), plug_tensors(runs / "online"))
    shutil.copytree(runs / "cache" / "boundaries", tmp_path / "cache" / "boundaries")
    again = succeed(*own, "stages=[boundaries,depth]", f"distill.intervals=[{PLUG_NAMES[0]}]").out
    assert again.count("reused") == 2
    assert "reused" in succeed(*own, "stages=[depth]").out


def test_written_again_nothing_changes(command: list[str], runs: Path) -> None:
    before = digests(folder_of(runs))
    assert "reused" in succeed(*command, "name=again", "stages=[boundaries]").out
    assert digests(folder_of(runs)) == before


def test_the_folder_above_names_the_set_that_fits(command: list[str], runs: Path, tmp_path: Path) -> None:
    """Nobody has to copy a fingerprint; where two sets fit, the sentence names both."""
    shutil.copytree(runs / "cache" / "boundaries", tmp_path / "sets")
    (whole,) = (tmp_path / "sets").iterdir()
    half = tmp_path / "sets" / "half"  # of a run that was killed
    shutil.copytree(whole, half, ignore=shutil.ignore_patterns("boundaries.json"))
    given = [*command, FROM, f"paths.runs_dir={tmp_path}", f"distill.boundaries={tmp_path / 'sets'}", "stages=[depth]"]
    succeed(*given, "name=above")
    assert_same_tensors(plug_tensors(tmp_path / "above"), plug_tensors(runs / "online"))
    refused = ppcl(*given, "name=none", "distill.batch_size=5")
    assert f"{whole} was written with distill.batch_size=4, not 5" in refused.err
    shutil.copy(whole / "boundaries.json", half)
    refused = ppcl(*given, "name=two")
    assert f"holds 2 sets of boundaries that fit ({whole.name}, half)" in refused.err
    succeed(*given, f"distill.boundaries={whole}", "name=two")


@pytest.mark.parametrize("pattern", ["*/train-0000.json", "*/train-0001.safetensors", "*/boundaries.json"])
def test_killed_and_resumed_they_are_the_same(command: list[str], runs: Path, tmp_path: Path, pattern: str) -> None:
    arguments = [*command, f"paths.runs_dir={tmp_path}", "name=killed", "stages=[boundaries]"]
    assert ppcl_process(pattern, *arguments, python=DIE_AT_RENAME).returncode == 9
    outcome = ppcl(*command, f"paths.runs_dir={tmp_path}", "name=early", "stages=[depth]", FROM)
    assert outcome.code == 2
    assert "run 'stages=[boundaries]' first" in outcome.err
    succeed(*arguments)
    found, whole = (digests(folder_of(path)) for path in (tmp_path, runs))
    assert {name: value for name, value in found.items() if not Path(name).name.startswith(".boundaries")} == whole


def test_replayed_steps_come_round_again(
    command: list[str], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = [f"paths.runs_dir={tmp_path}", "distill.replay=3"]
    outcome = succeed(*command, *replay, "name=replayed", "stages=[boundaries]")
    assert "MB for 20 steps" in outcome.out
    succeed(*command, *replay, FROM, "name=replayed", "stages=[depth]")
    replayed, online = plug_tensors(tmp_path / "replayed"), plug_tensors(runs / "online")
    assert replayed.keys() == online.keys()
    assert not all(torch.equal(value, online[key]) for key, value in replayed.items())
    # They are those of a training in memory that repeats its first batches.
    run = prepare([*command, f"paths.runs_dir={tmp_path}", "name=repeated", "stages=[depth]"])
    fresh, seed = run.data.shared_stream, run.config.data.train_seed

    monkeypatch.setattr(run.data, "shared_stream", lambda of, size: Repeated(fresh(of, size), 4 if of == seed else 99))
    train(run)
    assert_same_tensors(replayed, plug_tensors(tmp_path / "repeated"))
    # Killed behind its last checkpoint, it ends there too.
    again = [*command, *replay, FROM, "name=killed", "stages=[depth]", "distill.checkpoint_every=4"]
    assert ppcl_process("*.safetensors", *again, python=DIE_AT_RENAME).returncode == 9
    assert "resuming from" in succeed(*again).out
    assert_same_tensors(replayed, plug_tensors(tmp_path / "killed"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["distill.steps=20"], "raise distill.replay"),
        (["distill.batch_size=5"], "distill.batch_size=4, not 5"),
        (["distill.init=middle"], "distill.init=first, not middle"),
        (["intervals.transformer_blocks=[[0,1]]"], "no boundaries of transformer_blocks [0, 1]"),
        (["distill.mode=sequential"], "needs distill.mode=parallel"),
        (["distill.boundaries=/nonesuch"], "/nonesuch holds no boundaries"),
        (["distill.from_boundaries=false", "distill.replay=2"], "distill.replay=2 has no effect"),
    ],
)
def test_boundaries_that_do_not_fit_are_refused(
    command: list[str], runs: Path, overrides: list[str], said: str
) -> None:
    given = [f"distill.boundaries={folder_of(runs)}"] if "replay" not in overrides[-1] else []
    outcome = ppcl(*command, FROM, *given, *overrides, "name=bad", "stages=[depth]")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert said in outcome.err
    assert not (runs / "bad" / "plugs").exists()


def test_a_full_disk_is_seen_after_one_step(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    outcome = ppcl(*command, f"paths.runs_dir={tmp_path}", "name=full", "stages=[boundaries]")
    assert outcome.code == 2
    assert "1.00 KB free" in outcome.err
    assert not list(tmp_path.rglob("train-*"))
