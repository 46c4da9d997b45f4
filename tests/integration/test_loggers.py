"""Where a training's curves go: W&B offline, disabled, a CSV file, nowhere."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from commands import INTERVALS, assert_same_tensors, plug_tensors, ppcl_process, succeed

from tests.offline import read_offline


@pytest.fixture
def command(settings: list[str], tmp_path: Path) -> list[str]:
    kept = [argument for argument in settings if argument != "logger=none"]
    return [*kept, INTERVALS, f"paths.runs_dir={tmp_path}", "name=logged", "stages=[depth]"]


def test_offline_runs_hold_their_own_configuration(command: list[str], tmp_path: Path) -> None:
    """Two jobs of one process: each has a run of its own, with its own values."""
    sweep = ["distill.relative_update=0.01,0.02", "logger=wandb", "logger.mode=offline"]
    done = ppcl_process("--multirun", *command, *sweep)
    assert done.returncode == 0, done.stderr
    jobs = {f"distill.relative_update={rate}": rate for rate in (0.01, 0.02)}
    ids = {job: json.loads((tmp_path / "logged" / job / "wandb.json").read_text())["id"] for job in jobs}
    assert len({*ids.values()}) == 2
    for job, rate in jobs.items():
        folder = tmp_path / "logged" / job
        (run,) = folder.glob("wandb/offline-run-*/*.wandb")
        assert run.name == f"run-{ids[job]}.wandb"
        found = read_offline(folder)
        assert {*found.names, *found.groups} == {f"logged/{job}", "logged"}
        assert found.config["distill"]["relative_update"] == rate
        assert found.config["distill"]["steps"] == 6
        assert found.config["model"]["family"] == "qwen_image"
        assert {"depth/loss", "depth/gradient_norm", "depth/heldout_losses"} <= found.logged.keys()
        assert found.exits == [0]


def test_disabled_trains_alike(command: list[str], trained: Path, tmp_path: Path) -> None:
    done = ppcl_process(*command, "logger=wandb", "logger.mode=disabled")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.wandb"))
    assert_same_tensors(plug_tensors(tmp_path / "logged"), plug_tensors(trained))


def test_csv_holds_every_interval(command: list[str], trained: Path, tmp_path: Path) -> None:
    succeed(*command, "logger=csv")
    (metrics,) = (tmp_path / "logged" / "logs").rglob("metrics.csv")
    (row,) = csv.DictReader(metrics.read_text().splitlines())  # six steps: logged once, at the last
    total = float(row["depth/loss"])
    parts = [float(row[f"depth/transformer_blocks.{name}/loss"]) for name in ("1-2", "3-4")]
    assert sum(parts) == pytest.approx(total)
    assert_same_tensors(plug_tensors(tmp_path / "logged"), plug_tensors(trained))


def test_none_leaves_nothing(trained: Path) -> None:
    """`trained` ran with logger=none."""
    assert sorted(path.name for path in trained.iterdir()) == ["config.yaml", "plugs", "training", "versions.json"]


def test_a_training_says_what_it_cost(trained: Path) -> None:
    cost = json.loads((trained / "training" / "depth.json").read_text(encoding="utf-8"))
    assert cost["steps"] == 6
    assert cost["seconds"] > 0
    plugs = sum(path.stat().st_size for path in (trained / "plugs").glob("*.safetensors"))
    assert cost["peak_memory_mb"] > plugs / 1e6  # students, their gradients, two moments, and the teacher
