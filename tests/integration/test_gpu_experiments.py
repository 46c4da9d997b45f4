"""Experiments that need a GPU run in small on a CPU."""

import json
import sys

from experiments.scale import documented_way, gpu


def test_the_documented_way_is_taken_in_small(tmp_path, monkeypatch):
    """What was measured on a GPU at full size: every stage of the README's way for a small card."""
    record = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["documented_way", str(tmp_path), "--tiny", "--output", str(record)])
    documented_way.main()
    rows = json.loads(record.read_text())
    assert [*rows] == [*documented_way.WAY]
    assert not [row["failed"] for row in rows.values() if "failed" in row]


def test_what_is_timed_on_a_gpu_runs(tmp_path, monkeypatch):
    record = tmp_path / "record.json"
    phases = [name for name in gpu.PHASES if not name.endswith("compiled")]
    folder = ["--folder", str(tmp_path), "--output", str(record)]
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", *folder, "--only", *phases])
    monkeypatch.chdir(tmp_path)
    gpu.main()
    rows = json.loads(record.read_text())
    assert {*rows} == {*phases}
    assert not [row["failed"] for row in rows.values() if "failed" in row]
