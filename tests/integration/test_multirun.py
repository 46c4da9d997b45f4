"""A sweep: a job folder per value, and what the jobs have in common is made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import Outcome, succeed
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
