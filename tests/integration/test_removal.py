"""Variants without distillation: intervals cut to their first block, and projectors as least squares gives them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import INTERVALS, NUM_LAYERS, ppcl, succeed
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import ppcl as package

WIDTH = ["width.source=given", "width.transformer_blocks.text=[5]", "width.transformer_blocks.ffn=[3]"]
LEAST_SQUARES = [*WIDTH, "width.steps=0", "width.num_batches=2"]
TUNED = ["finetune=tiny", "finetune.steps=2", "finetune.batch_size=4"]
VARIANTS = "generate.variants=[teacher,removed,ppcl-width,ppcl-planned,ppcl-finetuned]"
REMOVED = ["transformer_blocks.1-2", "transformer_blocks.3-4"]


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def command(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run that trains nothing but the tuned model."""
    runs = tmp_path_factory.mktemp("removal")
    return [*settings, f"paths.runs_dir={runs}", INTERVALS, "distill.mode=none", *LEAST_SQUARES, *TUNED]


@pytest.fixture(scope="module")
def run(command: list[str]) -> Path:
    """The folder of such a run, from projectors to a report."""
    stages = "stages=[width,plan,finetune,export,generate,evaluate,report]"
    succeed(*command, "name=removal", "budget.params=0.66", VARIANTS, stages)
    return Path(next(a for a in command if a.startswith("paths.runs_dir=")).partition("=")[2]) / "removal"


def test_nothing_was_distilled(run: Path) -> None:
    projectors = {"transformer_blocks.3.ffn", "transformer_blocks.5.text"}
    assert {path.stem for path in (run / "plugs").glob("*.json")} == projectors
    assert not (run / "training" / "depth.json").exists()
    assert not (run / "training" / "width.json").exists()
    assert load(run / "plugs" / "transformer_blocks.3.ffn.json")["base"] == "transformer_blocks.3-4.removed"


def test_removals_and_projectors_are_planned(run: Path) -> None:
    costs = load(run / "plan" / "costs-removed.json")
    assert {unit["name"] for unit in costs["units"]} == {
        "transformer_blocks.1-2.removed",
        "transformer_blocks.3-4.removed",
        "transformer_blocks.3.ffn",
        "transformer_blocks.5.text",
    }
    assert all(unit["savings"]["params"] > 0 for unit in costs["units"])
    assert list(costs["frontier"]) == ["velocity"]  # there is no distillation loss to plan by
    (needing,) = (unit for unit in costs["units"] if unit["name"] == "transformer_blocks.3.ffn")
    assert needing["needs"] == ["transformer_blocks.3-4.removed"]
    choice = load(run / "plan" / "choice.json")
    assert choice["params_ratio"] <= 0.66
    assert "transformer_blocks.1-2.removed" in choice["plugged"]


def test_they_are_compared(run: Path) -> None:
    rows = {row["name"]: row for row in load(run / "report" / "report.json")["variants"]}
    assert rows["removed"]["removed"] == REMOVED
    assert rows["removed"]["num_layers"] == NUM_LAYERS - 2
    assert rows["ppcl-width"]["removed"] == REMOVED
    assert rows["ppcl-width"]["params"] < rows["removed"]["params"] < rows["teacher"]["params"]
    assert rows["ppcl-finetuned"]["params"] == rows["ppcl-planned"]["params"]
    assert all(row["students"] == [] for row in rows.values())


def test_the_tuned_model_is_exported(run: Path) -> None:
    config = load(run / "export" / "transformer" / "config.json")["ppcl"]
    plugged = load(run / "plan" / "choice.json")["plugged"]
    cut = [name.removesuffix(".removed") for name in plugged if name.endswith(".removed")]
    assert config["variant"] == "ppcl-finetuned"
    assert config["distill"] == "none"
    assert [f"transformer_blocks.{u}-{v}" for u, v in config["removed_intervals"]["transformer_blocks"]] == cut
    pipeline = DiffusionPipeline.from_pretrained(run / "export")
    assert len(pipeline.transformer.transformer_blocks) == len(config["kept_layers"]["transformer_blocks"])
    package.place_residuals(pipeline.transformer).remove()  # knows how many blocks there were


def test_a_second_run_takes_it_all(run: Path, command: list[str]) -> None:
    stages = "stages=[width,plan,finetune,export,generate,evaluate]"
    said = succeed(*command, "name=removal", "budget.params=0.66", VARIANTS, stages).out
    assert said.count("reused") >= 6


def test_a_removal_tunes_and_exports_without_projectors(command: list[str]) -> None:
    plain = [part for part in command if not part.startswith("width.")]
    runs = Path(next(a for a in command if a.startswith("paths.runs_dir=")).partition("=")[2])
    succeed(*plain, "name=plain", "stages=[export]", "export.variant=removed")
    teacher = next(a for a in command if a.startswith("model.path=")).partition("=")[2]
    whole = DiffusionPipeline.from_pretrained(teacher).transformer.transformer_blocks
    cut = DiffusionPipeline.from_pretrained(runs / "plain" / "export").transformer.transformer_blocks
    for block, index in zip(cut, (0, 1, 3, 5), strict=True):
        for mine, its in zip(block.parameters(), whole[index].parameters(), strict=True):
            assert torch.equal(mine, its)
    succeed(*plain, "name=tuned", "stages=[finetune]")
    assert load(runs / "tuned" / "finetuned" / "ppcl.json")["made_from"]["removed"] == REMOVED


def test_a_board_removes_by_name(settings: list[str], trained: Path, teacher: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    board = package.plug(pipeline, trained / "plugs")
    first = pipeline.transformer.transformer_blocks[1]
    board("transformer_blocks.1-2.removed", "transformer_blocks.3-4")
    assert board.removed_intervals == {"transformer_blocks": [[1, 2], [3, 4]]}
    assert pipeline.transformer.transformer_blocks[1] is not first
    board()
    assert len(pipeline.transformer.transformer_blocks) == NUM_LAYERS
    with pytest.raises(ValueError, match="at once"):
        board.arrange(students=["transformer_blocks.1-2"], removed=["transformer_blocks.1-2"])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["stages=[depth]"], "'stages=[depth]' has nothing to do with distill.mode=none"),
        (["stages=[generate]", "generate.variants=[teacher,ppcl-depth]"], "no variant ppcl-depth: use removed"),
        (["stages=[plan]", "budget.params=0.66", "budget.cost=loss"], "budget.cost=loss is not known of every plug"),
    ],
)
def test_what_needs_students_is_refused(run: Path, command: list[str], overrides: list[str], sentence: str) -> None:
    outcome = ppcl(*command, "name=removal", *overrides)
    assert outcome.code == 2
    assert sentence in outcome.err


def test_projectors_of_students_are_none_of_removals(
    settings: list[str], trained: Path, tmp_path: Path, command: list[str]
) -> None:
    shutil.copytree(trained, tmp_path / "trained")
    base = [*settings, f"paths.runs_dir={tmp_path}", INTERVALS, *LEAST_SQUARES]
    succeed(*base, "name=trained", "stages=[width]")
    removal = [*base, "name=removed", f"paths.base_run={tmp_path / 'trained'}", "distill.mode=none"]
    outcome = ppcl(*removal, "stages=[plan]", "budget.params=0.66")
    assert outcome.code == 2
    assert "transformer_blocks.3.ffn" in outcome.err
    assert "use width=none" in outcome.err
    plain = [part for part in removal if not part.startswith("width.")]
    succeed(*plain, "stages=[plan]", "budget.params=0.7")
    assert (tmp_path / "removed" / "plan" / "costs-removed.json").exists()


def test_a_board_finds_removals_by_their_projectors(run: Path, teacher: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    board = package.plug(pipeline, run / "plugs")
    assert board.removed == ["transformer_blocks.3-4"]
    assert board.width == {"transformer_blocks": {"text": [5], "ffn": [3]}}
    assert len(pipeline.transformer.transformer_blocks) == NUM_LAYERS - 1


def test_a_streamed_teacher_gives_the_same_projectors(run: Path, command: list[str], tmp_path: Path) -> None:
    streamed = [part for part in command if not part.startswith("paths.")]
    succeed(*streamed, f"paths.runs_dir={tmp_path}", "name=streamed", "stages=[width]", "model.streaming=true")
    for name in ("transformer_blocks.3.ffn", "transformer_blocks.5.text"):
        expected, found = (
            load_file(folder / "plugs" / f"{name}.safetensors") for folder in (run, tmp_path / "streamed")
        )
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items())
