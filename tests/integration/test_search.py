"""A search by Optuna: trials are jobs of a sweep, the same command goes on, and the best one is a command to paste."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import optuna
import pytest
from commands import DIE_AT_RENAME, INTERVALS, modified, ppcl, ppcl_process, succeed

from ppcl.artifacts.jobs import read_job
from ppcl.config import MINIMISED
from ppcl.report.compare import NUMBERS, jobs_of, results_of
from ppcl.search import _written

RATES = "distill.relative_update=tag(log,interval(0.01,0.3))"
SIZES = "budget.params=0.95,0.9,0.1"  # the last one is out of reach


@pytest.fixture(scope="module")
def command(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A search for a learning rate under a budget. Each trial trains and plans."""
    kept = [one for one in settings if not one.startswith("method.min_cka")]
    search = ["sweep=search", "name=rates", f"paths.runs_dir={tmp_path_factory.mktemp('search')}", INTERVALS]
    return [*kept, *search, "stages=[depth,plan]", "budget.params=0.9", "budget.num_batches=1", "method.min_cka=0"]


@pytest.fixture(scope="module")
def folder(command: list[str]) -> Path:
    """The folder of a search of four trials that went on to eight."""
    found = Path(next(one for one in command if one.startswith("paths.runs_dir=")).partition("=")[2]) / "rates"
    assert "best of 4 trials" in succeed("--multirun", *command, RATES, "hydra.sweeper.trials=4").out
    before = modified(*jobs_of(found))
    assert len(jobs_of(found)) == 4
    outcome = succeed("--multirun", *command, RATES, "hydra.sweeper.trials=8")
    assert before.items() <= modified(*jobs_of(found)).items()  # nothing was run again
    assert [line.split(":")[0].strip() for line in outcome.out.splitlines() if "sweep  job" in line] == [
        f"sweep  job {number} of 8" for number in (5, 6, 7, 8)
    ]
    return found


@pytest.fixture
def sizes(settings: list[str], trained: Path, tmp_path: Path) -> list[str]:
    """A search whose trials only plan, with the plugs of another run."""
    kept = [one for one in settings if not one.startswith(("method.min_cka", "distill.relative"))]
    search = ["sweep=search", "name=sizes", f"paths.runs_dir={tmp_path}", f"paths.base_run={trained}", INTERVALS]
    fixed = ["stages=[plan]", "budget.num_batches=1", "method.min_cka=0", "distill.relative_update=0.1"]
    return ["--multirun", *kept, *search, *fixed]


def test_the_best_trial_is_a_command_to_paste(folder: Path) -> None:
    best = json.loads((folder / "best.json").read_text())
    values = {job.name: results_of(job)["velocity_error"] for job in jobs_of(folder)}
    assert len(values) == 8
    assert best["value"] == min(values.values()) == values[best["job"]]
    assert (best["trials"], best["failed"]) == (8, 0)
    words = shlex.split(best["command"])
    assert words[0] == "ppcl"
    assert best["job"] in words
    outcome = succeed(*words[1:])
    assert "wrote" in outcome.out
    assert results_of(folder.parent / "rates_best")["velocity_error"] == best["value"]
    page = (folder / "comparison.html").read_text(encoding="utf-8")
    assert "The best of 8 trials: velocity error" in page
    assert page.count("<tr class=best>") == 1


def test_trials_do_not_depend_on_where_the_search_was_continued(folder: Path) -> None:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "study.journal")))
    trials = optuna.load_study(study_name="search", storage=storage).trials
    other = optuna.create_study()
    for trial in trials:
        other.sampler = optuna.samplers.TPESampler(seed=trial.number)
        asked = other.ask({"distill.relative_update": optuna.distributions.FloatDistribution(0.01, 0.3, log=True)})
        assert asked.params == trial.params
        other.tell(asked, trial.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["distill.relative_update=tag(log,interval(0.01,0.5))"], "this one has distill.relative_update=tag(log,inter"),
        (["distill.relative_update=0.1", "distill.steps=range(4,8)"], "this one has distill.relative_update=0.1"),
        ([RATES, "hydra.sweeper.minimise=drop_percent"], "and this one has hydra.sweeper.minimise=drop_percent"),
        ([RATES, "budget.params=0.8"], "a search with budget.params=0.9, and this one has budget.params=0.8"),
        ([RATES, "distill.steps=7"], "a search with distill.steps=6, and this one has distill.steps=7"),
        ([RATES, "hydra.sweeper.trials=0"], "hydra.sweeper.trials=0 must be at least 1"),
        ([RATES, "hydra.sweeper.minimise=score"], "hydra.sweeper.minimise=score is not one of"),
        ([RATES, "explain=true"], "explain=true has no result to search by"),
        (["distill.relative_update=0.1"], "hydra/sweeper=ppcl_search has nothing to search"),
        (
            ["distill.relative_update=tag(log,interval(0,0.5))"],
            "distill.relative_update=tag(log,interval(0,0.5)) is no",
        ),
        (["distill.relative_update=interval(0.1,inf)"], "is no range to search: it needs two ends, the lower first"),
        (["distill.relative_update=range(0.7,0.9,-0.1)"], "is no range to search: it needs two ends, the lower first"),
    ],
)
def test_another_search_in_the_folder_is_refused(
    command: list[str], folder: Path, change: list[str], said: str
) -> None:
    before = modified(folder)
    refused = ppcl("--multirun", *command, *change)
    assert refused.code == 2
    assert said in refused.err
    assert refused.err.count("\n") == 1
    assert modified(folder) == before


def test_a_failed_trial_ends_nothing_and_equal_trials_run_once(sizes: list[str], tmp_path: Path) -> None:
    outcome = ppcl(*sizes, SIZES, "hydra.sweeper.trials=8")
    assert outcome.code == 2
    jobs = jobs_of(tmp_path / "sizes")
    assert sorted(job.name for job in jobs) == ["budget.params=0.1", "budget.params=0.9", "budget.params=0.95"]
    assert len(re.findall(r"sweep  job \d of 8: ", outcome.out)) == 3  # five had settings of an earlier one
    assert [job.name for job in jobs if read_job(job).failed] == ["budget.params=0.1"]
    assert "ppcl: job budget.params=0.1: " in outcome.err
    best = json.loads((tmp_path / "sizes" / "best.json").read_text())
    assert best["job"] in {"budget.params=0.9", "budget.params=0.95"}
    assert best["failed"] >= 1


def test_a_result_that_no_trial_has_is_a_failure_with_its_remedy(sizes: list[str], tmp_path: Path) -> None:
    outcome = ppcl(*sizes, "budget.params=0.95,0.9", "hydra.sweeper.minimise=drop_percent", "hydra.sweeper.trials=1")
    assert outcome.code == 2
    assert "none of 1 trials has a result" in outcome.out
    assert "hydra.sweeper.minimise=drop_percent: the job has no such result; add the stages" in outcome.err
    assert not (tmp_path / "sizes" / "best.json").exists()


def test_a_trial_that_was_killed_runs_again(sizes: list[str], tmp_path: Path) -> None:
    command = [*sizes, "budget.params=interval(0.8,0.95)", "hydra.sweeper.trials=2"]
    killed = ppcl_process("*/job.json", *command, python=DIE_AT_RENAME)
    assert killed.returncode == 9, killed.stderr
    (folder,) = (tmp_path / "sizes").glob("budget*")
    outcome = succeed(*command)
    assert f"job 1 of 2: {folder.name}" in outcome.out
    assert "best of 2 trials" in outcome.out
    assert [read_job(job).number for job in jobs_of(tmp_path / "sizes")] == [0, 1]


def test_a_line_that_was_not_written_whole_is_cut_off(sizes: list[str], tmp_path: Path) -> None:
    command = [*sizes, "budget.params=interval(0.8,0.95)"]
    succeed(*command, "hydra.sweeper.trials=2")
    journal, before = tmp_path / "sizes" / "study.journal", modified(*jobs_of(tmp_path / "sizes"))
    journal.write_bytes(journal.read_bytes()[:-25])
    assert "best of 3 trials" in succeed(*command, "hydra.sweeper.trials=3").out
    assert before.items() <= modified(*jobs_of(tmp_path / "sizes")).items()
    for damage in (b"garbage\n", b"\xff\xfe\n", b"3\n"):
        content = journal.read_bytes()
        journal.write_bytes(content + damage)
        refused = ppcl(*command, "hydra.sweeper.trials=4")
        assert refused.code == 2
        assert f"{journal} is damaged: delete it, and give the same command again" in refused.err
        assert refused.err.count("\n") == 1
        journal.write_bytes(content)
    journal.unlink()
    assert "best of 3 trials" in succeed(*command, "hydra.sweeper.trials=3").out
    assert before.items() <= modified(*jobs_of(tmp_path / "sizes")).items()  # found again


@pytest.mark.parametrize("ends", [(0.80006, 0.80009), (0.99991, 0.99999), (1e-5, 3e-1), (-2.0, 5.0)])
def test_values_stay_in_their_range(ends: tuple[float, float]) -> None:
    distribution = optuna.distributions.FloatDistribution(*ends)
    for part in range(101):
        value = ends[0] + (ends[1] - ends[0]) * part / 100
        written = float(_written(value, distribution))
        assert ends[0] <= written <= ends[1]
        assert written == pytest.approx(value, abs=1e-3 * (ends[1] - ends[0]))


def test_every_result_that_can_be_minimised_is_compared() -> None:
    assert {*MINIMISED} < {key for _, key, _ in NUMBERS}
