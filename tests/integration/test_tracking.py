"""What every stage tells W&B, read back from the files of offline runs; lineage, failures, and the dashboard."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import INTERVALS, ppcl, ppcl_process, succeed

from tests.offline import Offline, read_offline

OFFLINE = ["logger=wandb", "logger.mode=offline"]
STAGES = "stages=[probe,detect,depth,width,plan,finetune,export,generate,evaluate,report]"
TABLES = {
    *("probe/residuals", "detect/intervals", "detect/curves", "depth/heldout_losses", "width/heldout_losses"),
    *("width/selection", "plan/costs", "plan/sizes", "evaluate/scores", "report/costs"),
}
PICTURES = {
    *("detect/curves_transformer_blocks", "detect/similarity", "plan/frontier", "report/samples", "report/quality"),
    *("generate/teacher", "generate/ppcl-finetuned", "report/losses"),
}


@pytest.fixture(scope="module")
def told(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Offline]:
    """A run that has gone through all stages of the demo, and what W&B was told of it."""
    runs = tmp_path_factory.mktemp("told")
    command = [argument for argument in settings if argument != "logger=none"]
    command += [f"paths.runs_dir={runs}", "name=told", STAGES, "width=tiny", "width.steps=2", "finetune=tiny"]
    command += ["finetune.steps=2", "finetune.batch_size=4", "budget.params=0.9", "budget.num_batches=1"]
    done = ppcl_process(*command, *OFFLINE)
    assert done.returncode == 0, done.stderr
    return runs / "told", read_offline(runs / "told")


def test_every_stage_shows_its_numbers_tables_and_pictures(told: tuple[Path, Offline]) -> None:
    _, found = told
    of_kind = {kind: {key for key, value in found.kinds.items() if value == kind} for kind in {*found.kinds.values()}}
    assert of_kind["table-file"] >= TABLES
    assert of_kind["image-file"] >= PICTURES
    assert of_kind["html-file"] == {"report/page"}
    numbers = {
        *("probe/mean_residual", "detect/blocks_left", "depth/loss", "depth/gradient_norm", "width/plugs"),
        *("plan/params_ratio", "finetune/velocity_error_after", "export/gigabytes", "ppcl-finetuned/drop_percent"),
    }
    assert numbers <= found.logged.keys()
    assert {"result/params_percent", "result/velocity_error", "result/training_seconds"} <= found.summary.keys()
    assert found.exits == [0]


def test_the_record_has_the_id_of_the_run(told: tuple[Path, Offline]) -> None:
    folder, _ = told
    (run,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert run.name == f"run-{json.loads((folder / 'wandb.json').read_text())['id']}.wandb"


def test_files_lie_beside_the_run(told: tuple[Path, Offline]) -> None:
    folder, _ = told
    (run,) = (folder / "wandb").glob("offline-run-*")
    for kind, keys in (("table", TABLES), ("images", PICTURES), ("html", {"report/page"})):
        stored = {str(path.relative_to(run / "files/media" / kind)) for path in (run / "files/media" / kind).rglob("*")}
        assert all(any(name.startswith(f"{key}_") for name in stored) for key in keys), kind
    assert any((folder / "wandb/artifacts/staging").iterdir())


def test_the_table_of_curves_has_every_interval(told: tuple[Path, Offline]) -> None:
    folder, _ = told
    (path,) = folder.glob("wandb/offline-run-*/files/media/table/detect/curves_*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["stack", "stream", "first", "last", "cka", "delta"]
    measured = json.loads((folder / "plan" / "curves.json").read_text())
    for stack, stream, first, last, cka, delta in table["data"]:
        assert measured["cka"][stack][stream][first][last] == cka
        assert measured["delta"][stack][stream][first][last] == delta
    known = [value for row in measured["cka"]["transformer_blocks"]["mean"] for value in row if value is not None]
    assert len(known) == sum(row[:2] == ["transformer_blocks", "mean"] for row in table["data"]) > 0


def test_artifacts_name_what_they_were_made_from(told: tuple[Path, Offline]) -> None:
    """Every input is a version that was logged, too, so that the lineage is whole."""
    folder, found = told
    every = found.artifacts
    kinds = {metadata["type"] for versions in every.values() for metadata in versions.values()}
    assert kinds == {"probes", "plan", "plugs", "choice", "finetuned", "export"}
    inputs = {
        metadata["type"]: {each["name"] for each in metadata["made_from"]}
        for versions in every.values()
        for metadata in versions.values()
    }
    assert inputs == {
        "probes": set(),
        "plan": {"probes-told"},
        "plugs": {"plan-told"},
        "choice": {"plan-told", "plugs-told"},
        "finetuned": {"choice-told", "plugs-told"},
        "export": {"finetuned-told"},
    }
    for versions in every.values():
        for metadata in versions.values():
            assert all(each["digest"] in every[each["name"]] for each in metadata["made_from"])
    assert len(every["plugs-told"]) == 2  # the students, and then with the projectors
    weights = [name for name in found.files["plugs-told"] if name.endswith(".safetensors")]
    assert len(weights) == len(list((folder / "plugs").glob("*.safetensors")))
    assert all(name.startswith(f"file://{folder}") for name in weights)  # not uploaded: they are large


def test_what_is_told_once_is_not_told_again(told: tuple[Path, Offline], tmp_path: Path) -> None:
    """A command that finds everything done goes on with the same W&B run, and adds nothing of the stages."""
    folder, before = told
    copied = tmp_path / "told"
    shutil.copytree(folder, copied)
    shutil.rmtree(copied / "wandb")
    done = ppcl_process(f"run={copied}", *OFFLINE, "stages=[detect,depth,finetune]")
    assert done.returncode == 0, done.stderr
    assert not list(copied.glob("wandb/offline-run-*"))
    done = ppcl_process(f"run={copied}", *OFFLINE, "stages=[plan]", "budget.params=0.95")
    assert done.returncode == 0, done.stderr
    found = read_offline(copied)
    assert json.loads((copied / "wandb.json").read_text())["id"] in str(next(copied.glob("wandb/offline-run-*")))
    assert {*found.artifacts} == {"choice-told"}
    assert {*found.artifacts["choice-told"]} != {*before.artifacts["choice-told"]}


@pytest.mark.parametrize(
    "content", ["{", '{"id": "a/b c#"}', '{"id": 5}', '{"id": "abc", "stages": null}', '{"id": "abc", "artifacts": 3}']
)
def test_a_damaged_record_is_named(content: str, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "trained")
    (tmp_path / "trained" / "wandb.json").write_text(content)
    outcome = ppcl(f"run={tmp_path / 'trained'}", "stages=[depth]", *OFFLINE)
    assert outcome.code == 2
    assert (
        outcome.err
        == f"ppcl: {tmp_path / 'trained' / 'wandb.json'} is damaged: delete it, and this run gets a new id at W&B.\n"
    )


def test_a_record_that_lacks_keys_is_completed(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "trained")
    (tmp_path / "trained" / "wandb.json").write_text('{"id": "abc"}')
    succeed(f"run={tmp_path / 'trained'}", "stages=[depth]", *OFFLINE)
    assert len(list((tmp_path / "trained").glob("wandb/offline-run-*/run-abc.wandb"))) == 1


def test_a_variable_of_wandb_without_sense_is_told(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "trained")
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    done = ppcl_process(f"run={tmp_path / 'trained'}", "stages=[depth]", *OFFLINE)  # W&B reads it once in a process
    assert done.returncode == 2
    assert "look at the variables WANDB_*" in done.stderr
    assert done.stderr.count("\n") == 1


def test_artifacts_of_odd_names_stay_apart(tmp_path: Path) -> None:
    from ppcl.tracking.lineage import Made

    names = [
        Made("plugs", tmp_path / name, ()).name for name in ("demo", "a b", "a#b", "\u65e5\u672c", "x" * 190 + "#")
    ]
    assert names[0] == "plugs-demo"
    assert len({*names}) == 5
    assert all(re.fullmatch(r"[a-zA-Z0-9._-]{1,128}", name) for name in names)


def test_weights_are_uploaded_on_request(settings: list[str], trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "trained")
    succeed(f"run={tmp_path / 'trained'}", "stages=[depth]", *OFFLINE, "logger.upload=true")
    files = read_offline(tmp_path / "trained").files["plugs-trained"]
    assert sum(name.endswith(".safetensors") for name in files) == 2
    assert not any(name.startswith("file:") for name in files)


def test_a_failed_job_is_marked_as_failed(settings: list[str], trained: Path, tmp_path: Path) -> None:
    command = [argument for argument in settings if argument != "logger=none"]
    jobs = ["name=sizes", f"paths.base_run={trained}", "stages=[plan]", "budget.num_batches=1", INTERVALS]
    command += [f"paths.runs_dir={tmp_path}", *jobs, "budget.params=0.9,0.1", *OFFLINE]
    assert ppcl_process("--multirun", *command).returncode == 2
    found = {folder.name: read_offline(folder) for folder in (tmp_path / "sizes").iterdir() if folder.is_dir()}
    assert sorted(each.exits for each in found.values()) == [[0], [1]]
    (failed,) = (each for each in found.values() if each.exits == [1])
    assert "budget.params=0.1" in failed.summary["failed"]
    (fine,) = (each for each in found.values() if each.exits == [0])
    assert fine.summary["failed"] == ""
    assert {*failed.groups, *fine.groups} == {"sizes"}
    assert any(name.startswith("choice-sizes-") for name in fine.artifacts)


def test_a_mistake_outside_of_a_sweep_opens_no_run(settings: list[str], tmp_path: Path) -> None:
    command = [argument for argument in settings if argument != "logger=none"]
    done = ppcl_process(*command, f"paths.runs_dir={tmp_path}", "stages=[depth]", *OFFLINE)
    assert done.returncode == 2
    assert not list(tmp_path.rglob("*.wandb"))


def test_the_dashboard_has_the_panels_of_a_sweep() -> None:
    pytest.importorskip("wandb_workspaces")
    from ppcl.tracking.dashboard import dashboard

    made = dashboard("team", "ppcl")
    made._to_model()  # what saving would send
    panels = {panel.title: panel for section in made.sections for panel in section.panels if hasattr(panel, "title")}
    drop = panels["drop of the score in %, against the size in % of the teacher"]
    assert (drop.x.name, drop.y.name) == ("result/params_percent", "result/drop_percent")
    swept = {column.metric.name for column in panels["settings and what came out"].columns}
    assert {"method.name", "budget.params", "distill.relative_update", "result/drop_percent"} <= swept
    assert panels["held-out loss of each student"].metric_regex == "depth/.+/heldout"
    shown = {key for panel in panels.values() for key in getattr(panel, "media_keys", [])}
    assert {"detect/similarity", "plan/frontier", "report/samples", "evaluate/scores"} <= shown


@pytest.mark.parametrize("given", [[], ["team"], ["team/"], ["a/b/c"], ["a/b", "c/d"]])
def test_the_dashboard_needs_a_project(given: list[str]) -> None:
    from ppcl.errors import UsageError
    from ppcl.tracking.dashboard import make_dashboard

    with pytest.raises(UsageError, match="ppcl dashboard ENTITY/PROJECT"):
        make_dashboard(given)
