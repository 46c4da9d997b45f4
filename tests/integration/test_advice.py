"""A refused command says what to do instead; these tests do just that."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import INTERVALS, PLUG_NAMES, digests, ppcl, succeed

OTHER = "intervals.transformer_blocks=[[0,2]]"
DEPTH = ["stages=[depth]"]


@pytest.fixture
def command(settings: list[str], tmp_path: Path) -> list[str]:
    small = ["width.steps=2", "width.num_batches=1", "width.num_ffn=1", "width.num_text=0"]
    return [*settings, *small, f"paths.runs_dir={tmp_path}", "name=run"]


def refused(*command: str) -> str:
    outcome = ppcl(*command)
    assert outcome.code == 2, outcome.out
    assert outcome.err.count("\n") == 1
    return outcome.err


def plan_of(folder: Path) -> dict:
    return json.loads((folder / "plan" / "plan.json").read_text())


@pytest.fixture(scope="module")
def detected(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs folder of a run that has detected its intervals and distilled students. Copy it, do not write."""
    runs = tmp_path_factory.mktemp("detected")
    succeed(*settings, f"paths.runs_dir={runs}", "name=run", "stages=[probe,detect,depth]")
    return runs


@pytest.fixture
def run(detected: Path, tmp_path: Path) -> Path:
    shutil.copytree(detected, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def test_plans_that_count_replace_one_another(command: list[str], tmp_path: Path) -> None:
    """Other intervals, another width, in one run's folder: the README's first lines one after the other."""
    counts = []
    for change in ([INTERVALS], [INTERVALS, "width.source=given", "width.transformer_blocks.ffn=[0]"], [OTHER]):
        assert "plan  wrote" in succeed(*command, *change, "stages=[plan]").out
        assert "plan  reused" in succeed(*command, *change, "stages=[plan]").out
        counts.append(plan_of(tmp_path / "run")["parameters"]["student"])
    assert counts[1] < counts[0] == counts[2]
    succeed(*command, "stages=[probe,detect]")
    assert "detection" in plan_of(tmp_path / "run")["made_from"]


def test_counting_never_replaces_what_was_detected(command: list[str], run: Path) -> None:
    before = digests(run)
    sentence = refused(*command, OTHER, "stages=[plan]")
    assert "leave out intervals= to use these intervals, or give name=OTHER to count others" in sentence
    assert digests(run) == before
    succeed(*command, "stages=[plan]")
    succeed(*command, OTHER, "stages=[plan]", "name=OTHER")
    assert digests(run / "plan") == digests(run / "plan")
    assert plan_of(run.parent / "OTHER")["intervals"] == {"transformer_blocks": [[0, 2]]}


def test_another_detection_goes_into_another_run_or_replaces_the_file(command: list[str], run: Path) -> None:
    again = [*command, "method.num_samples=2", "stages=[probe,detect]"]
    sentence = refused(*again)
    assert "method.num_samples=4, now 2" in sentence
    assert "give this run another name=, or delete that file to detect anew" in sentence
    succeed(*again, "name=OTHER")
    (run / "plan" / "plan.json").unlink()
    assert "wrote" in succeed(*again).out


def test_with_run_the_remedy_says_what_name_takes_the_place_of(run: Path) -> None:
    again = ["method.num_samples=2", "stages=[probe,detect]"]
    sentence = refused(f"run={run}", *again)
    found = re.search(
        r"name= takes the place of run=(\S+), so repeat the settings of that run, which (\S+) lists", sentence
    )
    assert found, sentence
    assert (found[1], Path(found[2])) == (str(run), run / "config.yaml")
    assert "takes the place" not in refused(f"run={run}", "name=OTHER", *again)


def test_changed_steps_train_other_students_of_detected_intervals(command: list[str], run: Path) -> None:
    before = digests(run)
    sentence = refused(*command, "distill.steps=3", *DEPTH)
    assert "distill.steps=6, now 3" in sentence
    other = re.search(r"train others with (name=OTHER \S+ \S+), or delete (\S+) to train them anew", sentence)
    assert other, sentence
    succeed(*command, "distill.steps=3", *DEPTH, *other[1].split())
    assert digests(run) == before
    trained = {path.name for path in (run / "plugs").iterdir()}
    assert {path.name for path in (run.parent / "OTHER" / "plugs").iterdir()} == trained
    shutil.rmtree(other[2])
    succeed(*command, "distill.steps=3", *DEPTH)
    assert {path.name for path in (run / "plugs").iterdir()} == trained
    # Where the command detects, a name is enough.
    assert "train others with name=OTHER, or" in refused(*command, "stages=[probe,detect,depth]")
    succeed(*command, "stages=[probe,detect,depth]", "name=third")


@pytest.mark.parametrize("further", ["width=auto|stages=[width,export]", "stages=[finetune,export]"])
def test_an_older_export_is_in_the_way_before_anything_is_trained(command: list[str], run: Path, further: str) -> None:
    succeed(*command, "stages=[export]")
    before, more = digests(run), [*command, "finetune.steps=2", *further.split("|")]
    sentence = refused(*more)
    assert re.search(r"export/ppcl\.json was made with variant='ppcl-depth', now 'ppcl-(width|finetuned)'", sentence)
    other = re.search(r"give this run another name=, as in (.*), or delete (\S+) to make it anew", sentence)
    assert other, sentence
    assert digests(run) == before
    shutil.rmtree(other[2])
    succeed(*more)
    assert "export  reused" in succeed(*more).out
    succeed(*more, *other[1].split())


def test_changed_steps_train_other_students_of_a_run_that_this_one_is_based_on(command: list[str], run: Path) -> None:
    based = [*command, "name=sized", f"paths.base_run={run}", "distill.steps=3", *DEPTH]
    other = re.search(r"train others with (name=OTHER .*) and without paths.base_run=, or", refused(*based))
    assert other
    succeed(*(a for a in based if not a.startswith("paths.base_run")), *other[1].split())


def test_changed_steps_train_other_students_of_given_intervals(command: list[str], trained: Path) -> None:
    runs = trained.parent
    given = [*(a for a in command if not a.startswith(("name", "paths.runs"))), INTERVALS, "distill.steps=3", *DEPTH]
    assert "train others with name=OTHER, or" in refused(*given, f"paths.runs_dir={runs}", "name=trained")
    succeed(*given, f"paths.runs_dir={runs}", "name=OTHER")
    assert {path.stem for path in (runs / "OTHER" / "plugs").iterdir()} == {*PLUG_NAMES}


def test_changed_width_is_selected_and_trained_anew(command: list[str], run: Path) -> None:
    width = [*command, "width=auto", "width.num_text=0", "stages=[width]"]
    succeed(*width, "width.num_ffn=1")
    sentence = refused(*width, "width.num_ffn=2")
    assert "width.num_ffn=1, now 2" in sentence
    assert "delete that file to select anew" in sentence
    (run / "plan" / "width.json").unlink()
    succeed(*width, "width.num_ffn=2")
    sentence = refused(*width, "width.num_ffn=2", "width.steps=3")
    deleted = re.search(r"delete (\S+) and (\S+) to train all projectors anew", sentence)
    assert deleted, sentence
    for pattern in deleted.groups():
        for path in Path(pattern).parent.glob(Path(pattern).name):
            path.unlink()
    assert "wrote 2 projectors" in succeed(*width, "width.num_ffn=2", "width.steps=3").out


def test_width_sets_that_were_given_replace_one_another(command: list[str], run: Path) -> None:
    kept = plan_of(run)["intervals"]["transformer_blocks"][0][0]
    for blocks in ([], [kept]):
        sets = {"ffn": [kept], "text": blocks if kept else []}
        given = [f"width.transformer_blocks.{kind}={found}" for kind, found in sets.items()]
        succeed(*command, "width.source=given", *given, "stages=[width]")


def test_a_checkpoint_of_other_settings_is_gone_on_with_or_deleted(command: list[str], tmp_path: Path) -> None:
    train = [*command, INTERVALS, *DEPTH, "distill.checkpoint_every=1", "distill.warmup_steps=1"]
    refused(*train, "distill.relative_update=1000")  # stops with a checkpoint
    sentence = refused(*train)
    folder = re.search(r"go on with that setting, or delete (\S+) to train anew", sentence)
    assert folder, sentence
    shutil.rmtree(folder[1])
    assert "wrote 2 plugs" in succeed(*train).out


def test_boundaries_of_other_settings_lie_elsewhere_or_are_deleted(command: list[str], tmp_path: Path) -> None:
    write = [*command, INTERVALS, "stages=[boundaries]", "distill.steps=2"]
    succeed(*write, f"distill.boundaries={tmp_path / 'here'}")
    sentence = refused(*write, f"distill.boundaries={tmp_path / 'here'}", "distill.batch_size=2")
    deleted = re.search(r"give another folder as distill\.boundaries=, or delete (\S+) to write it anew", sentence)
    assert deleted, sentence
    succeed(*write, f"distill.boundaries={tmp_path / 'there'}", "distill.batch_size=2")
    shutil.rmtree(deleted[1])
    succeed(*write, f"distill.boundaries={tmp_path / 'here'}", "distill.batch_size=2")
