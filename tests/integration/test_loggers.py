"""Where a training's curves go: W&B offline, disabled, a CSV file, nowhere."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import INTERVALS, assert_same_tensors, plug_tensors, ppcl_process, succeed

BLOCK = 32768


def stored(path: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file, a LevelDB log: blocks of pieces with checksum, length and kind ahead."""
    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield whole
            whole = b""


def records(path: Path) -> tuple[dict[str, Any], set[str]]:
    """The configuration and the names of logged values in an offline W&B run."""
    from wandb.proto.wandb_internal_pb2 import Record

    config: dict[str, Any] = {}
    logged: set[str] = set()
    for data in stored(path):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind in ("config", "run"):
            updates = (record.config if kind == "config" else record.run.config).update
            config |= {update.key: json.loads(update.value_json) for update in updates if update.key}
        if kind == "history":
            logged |= {item.key or ".".join(item.nested_key) for item in record.history.item}
    return config, logged


def groups(path: Path) -> list[str]:
    """The names of the groups that an offline W&B run says it belongs to."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for data in stored(path):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run" and record.run.run_group:
            found.append(record.run.run_group)
    return found


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
    ids = {job: json.loads((tmp_path / "logged" / job / "wandb.json").read_text())["depth"] for job in jobs}
    assert len({*ids.values()}) == 2
    for job, rate in jobs.items():
        (run,) = (tmp_path / "logged" / job / "wandb").glob("offline-run-*/*.wandb")
        assert run.stat().st_size > 0
        assert run.name == f"run-{ids[job]}.wandb"
        assert next(name for name in groups(run)) == "logged"
        config, logged = records(run)
        assert config["distill"]["relative_update"] == rate
        assert config["distill"]["steps"] == 6
        assert config["model"]["family"] == "qwen_image"
        assert "depth/loss" in logged


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
