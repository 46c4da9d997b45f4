"""A sweep: a job folder per value, and what the jobs have in common is made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import INTERVALS, Outcome, assert_same_tensors, plug_tensors, ppcl_process, succeed
from omegaconf import OmegaConf


@pytest.fixture(scope="module")
def sweep(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    runs = tmp_path_factory.mktemp("sweep")
    arguments = ["method=ppcl,ppcl_lp_a", "stages=[probe,detect]", "name=sweep"]
    return runs, succeed("--multirun", *settings, f"paths.runs_dir={runs}", *arguments)


def test_every_job_has_its_folder(sweep: tuple[Path, Outcome]) -> None:
    runs, _ = sweep
    jobs = sorted(path.name for path in (runs / "sweep").iterdir() if path.is_dir())
    assert jobs == ["0", "1"]
    for job, method in zip(jobs, ("ppcl", "ppcl_lp_a"), strict=True):
        config = OmegaConf.load(runs / "sweep" / job / "config.yaml")
        assert config.method.name == method
        plan = json.loads((runs / "sweep" / job / "plan" / "plan.json").read_text())
        assert plan["made_from"]["method"]["name"] == method
        assert (runs / "sweep" / job / "plan" / "similarity.png").exists()


def test_probes_are_made_once(sweep: tuple[Path, Outcome]) -> None:
    runs, outcome = sweep
    assert len(list((runs / "cache" / "probes").iterdir())) == 1
    lines = [line.strip() for line in outcome.out.splitlines() if line.strip().startswith("probe ")]
    assert sum("wrote" in line for line in lines) == 1
    assert sum("reused" in line for line in lines) == 1


def test_intervals_train_in_processes_of_their_own_and_meet(settings: list[str], trained: Path, tmp_path: Path) -> None:
    """One run has the boundaries and the plugs, the jobs of a sweep a folder each."""
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}"]
    succeed(*command, "name=all", "stages=[boundaries]")
    jobs = ["name=jobs", f"paths.base_run={tmp_path / 'all'}", "stages=[depth]", "distill.from_boundaries=true"]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = ppcl_process("--multirun", *command, *jobs, "distill.intervals=[1-2],[3-4]", *launcher)
    assert done.returncode == 0, done.stderr
    assert_same_tensors(plug_tensors(tmp_path / "all"), plug_tensors(trained))
    failed = ppcl_process("--multirun", *command, *jobs, "distill.intervals=[1-2],[9-10]", *launcher)
    assert failed.returncode == 2
    assert "distill.intervals=9-10 is not one of this run's intervals" in failed.stderr


def test_explain_leaves_no_folder_of_a_sweep(settings: list[str], tmp_path: Path) -> None:
    command = [*settings, f"paths.runs_dir={tmp_path / 'runs'}", "name=sweep", "stages=[probe]", "explain=true"]
    assert succeed("--multirun", *command, "probe.batch_size=4,8").out.count("estimates") == 2
    assert not (tmp_path / "runs" / "sweep").exists()
