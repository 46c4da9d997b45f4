"""A sweep: a job folder per value, and what the jobs have in common is made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import INTERVALS, Outcome, assert_same_tensors, modified, plug_tensors, ppcl, ppcl_process, succeed
from omegaconf import OmegaConf

from ppcl.paths import job_folder


@pytest.fixture(scope="module")
def sweep(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    runs = tmp_path_factory.mktemp("sweep")
    arguments = ["method=ppcl,ppcl_lp_a", "stages=[probe,detect]", "name=sweep"]
    return runs, succeed("--multirun", *settings, f"paths.runs_dir={runs}", *arguments)


def test_every_job_has_its_folder(sweep: tuple[Path, Outcome]) -> None:
    runs, _ = sweep
    jobs = sorted(path.name for path in (runs / "sweep").iterdir() if path.is_dir())
    assert jobs == ["method=ppcl", "method=ppcl_lp_a"]
    for job, method in zip(jobs, ("ppcl", "ppcl_lp_a"), strict=True):
        config = OmegaConf.load(runs / "sweep" / job / "config.yaml")
        assert config.method.name == method
        plan = json.loads((runs / "sweep" / job / "plan" / "plan.json").read_text())
        assert plan["made_from"]["method"]["name"] == method
        assert (runs / "sweep" / job / "plan" / "similarity.png").exists()


def test_a_heading_says_which_job_begins(sweep: tuple[Path, Outcome]) -> None:
    _, outcome = sweep
    lines = [line.strip() for line in outcome.out.splitlines() if line.strip().startswith("sweep  job")]
    assert lines == ["sweep  job 1 of 2: method=ppcl", "sweep  job 2 of 2: method=ppcl_lp_a"]


def test_a_sweep_with_more_values_finds_what_is_finished(settings: list[str], tmp_path: Path) -> None:
    """A job's folder does not depend on its number, nor on the order of what is typed, nor on what all jobs share."""
    command = [*settings, f"paths.runs_dir={tmp_path}", "name=more", "stages=[probe,detect]"]
    succeed("--multirun", *command, "method.min_length=2", "method=ppcl_lp_a")  # one job has the sweep's own folder
    assert (tmp_path / "more" / "plan" / "plan.json").exists()
    succeed("--multirun", *command, "method=ppcl,ppcl_lp_a", "method.end=4,5")
    before = modified(*(path / "plan" for path in (tmp_path / "more").glob("method*")))
    again = succeed("--multirun", "method.end=3,4,5", *command, "method=ppcl,ppcl_lp_a", "trainer.num_threads=1")
    jobs = [f"method.end={end},method={method}" for end in (3, 4, 5) for method in ("ppcl", "ppcl_lp_a")]
    assert sorted(jobs) == sorted(path.name for path in (tmp_path / "more").glob("method*"))
    assert before.items() <= modified(*(tmp_path / "more" / job / "plan" for job in jobs)).items()
    assert "6 jobs, compared in" in again.out


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("", "."),
        ("budget.cost=loss,budget.params=0.5", "budget.cost=loss,budget.params=0.5"),
        ("distill.intervals=[3-5]", "distill.intervals=3-5-"),
        ("paths.base_run=runs/mine", "paths.base_run=runs-mine-"),
        ("generate.prompt='a cat, \"asleep\"'", "generate.prompt=a-cat,-asleep-"),
        ("intervals.names=[" + "transformer_blocks.1-2," * 9 + "]", "intervals.names=transformer_blocks.1-2,"),
    ],
)
def test_the_name_of_a_job_fits_a_file_system(overrides: str, name: str) -> None:
    found = job_folder(overrides)
    assert found.startswith(name)
    assert (found == name) == (not name.endswith(("-", ",")))
    assert len(found) <= 100
    assert not {*found} & {*"/[]'\" "}


def test_jobs_with_alike_names_have_folders_of_their_own() -> None:
    names = ["a=[3-5]", "a=3-5", "a=[3/5]", "a=" + "5" * 200, "a=" + "5" * 201]
    assert len({job_folder(name) for name in names}) == len(names)


@pytest.mark.parametrize("swept", [["budget.params=0.5,0.7"], ["method=ppcl,ppcl_lp_a", "run={run},{run}2"]])
def test_jobs_that_would_share_a_folder_are_refused(trained: Path, swept: list[str]) -> None:
    before = modified(trained)
    given = [argument.format(run=trained) for argument in swept]
    run = [] if any(argument.startswith("run=") for argument in given) else [f"run={trained}"]
    refused = ppcl("--multirun", *run, *given, "stages=[plan]")
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert "use paths.base_run=" in refused.err
    assert modified(trained) == before


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
