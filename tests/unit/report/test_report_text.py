"""Words and tables that stages, the report's page and the terminal share."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from scored import MEASURED, SCORES, compared

from ppcl.artifacts.headers import Header
from ppcl.artifacts.scores import Fidelity, Likeness, NoiseLevel, ScoreRow
from ppcl.config import STORED_VARIANTS
from ppcl.report.text import (
    MEANINGS,
    level_columns,
    notes_of,
    plugs_in_words,
    plugs_of,
    result_of,
    score_columns,
    score_table,
    show_risen,
)


def test_the_terminals_table_of_a_large_model_has_at_most_80_columns() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(score_table(compared(SCORES, **MEASURED)))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 2 + len(SCORES)  # a heading of two lines
    assert max(map(len, lines)) <= 80
    assert "ppcl-finetuned" in lines[-1]


def test_the_terminals_table_of_a_large_model_has_room_for_its_fidelity() -> None:
    fidelity = Fidelity([Likeness(18.25, 0.5), Likeness(100.0, 1.0)], [NoiseLevel(0.101, 0.5, 0.0123)])
    rows = compared(dict.fromkeys(SCORES), velocity_error=0.01234, latent_distance=0.5678, fidelity=fidelity)
    assert score_columns(rows)["PSNR\ndB"][0] == "59.1"
    assert score_columns(rows)["SSIM"][0] == "0.750"
    assert level_columns(rows)["\u03c3 0.10\nto 0.50"] == ["0.0123"] * len(SCORES)
    measured, few = notes_of(rows, "share")[-2:]
    assert measured.startswith("PSNR and SSIM: ")
    assert few.startswith("PSNR and SSIM are of 2 pictures, too few")
    console = Console(file=io.StringIO(), width=200)
    console.print(score_table(rows))
    assert max(map(len, console.file.getvalue().splitlines())) <= 80  # type: ignore[attr-defined]


def test_a_score_has_its_interval() -> None:
    columns = score_columns(compared(SCORES, **MEASURED), details=True)
    assert columns["score"][0] == "0.878 ± 0.03"
    assert columns["two\nobject"][0] == "0.44"
    assert columns["drop\n%"] == ["0.0", "0.0", "0.0", "100.0"]
    assert columns["velocity\nerror"][0] == "0.0123"
    assert columns["latent\ndistance"][0] == "0.568"
    assert columns["of the\nteacher"][-1] == "48.9%"
    assert score_columns(compared(SCORES))["score"][0] == "0.878"


def test_columns_without_a_value_are_left_out() -> None:
    assert "velocity\nerror" not in score_columns(compared(SCORES))
    rows = compared(dict.fromkeys(SCORES), velocity_error=0.0)
    columns = score_columns(rows, details=True)
    assert not {"score", "drop\n%", "two\nobject", "latent\ndistance"} & columns.keys()
    assert columns["velocity\nerror"] == ["0.0000"] * 4  # nought is a value


def test_notes_speak_of_what_the_table_has() -> None:
    assert [note.partition(":")[0] for note in notes_of(compared(SCORES), "share")] == ["score", "drop"]
    unscored = notes_of(compared(dict.fromkeys(SCORES), velocity_error=0.1, latent_distance=0.1), "share")
    assert [note.partition(":")[0] for note in unscored] == ["velocity error", "latent distance"]


def test_every_variant_is_explained() -> None:
    assert MEANINGS.keys() == {*STORED_VARIANTS}


def test_a_run_is_about_its_furthest_variant() -> None:
    assert result_of(["teacher", "removed", "ppcl-depth", "ppcl-planned", "ppcl-finetuned"]) == "ppcl-finetuned"
    assert result_of(["teacher", "removed", "ppcl-depth", "ppcl-mixed"]) == "ppcl-depth"
    assert result_of(["teacher", "removed"]) == "removed"
    assert result_of(["teacher"]) is None


def test_plugs_are_told_by_stack() -> None:
    rows = compared(SCORES)
    assert plugs_in_words(plugs_of(rows[0])) == []
    assert plugs_in_words(plugs_of(rows[1])) == ["cut to their first block in transformer_blocks: 3-5"]
    names = ["encoder.blocks.1-2", "encoder.blocks.4-6", "b.7.ffn", "b.8.ffn", "b.8.text"]
    assert plugs_in_words(names) == [
        "students in encoder.blocks: 1-2, 4-6",
        "projectors for FFNs in b: 7, 8",
        "projectors for text streams in b: 8",
    ]


def test_plugs_that_end_worse_than_they_began_are_told_with_the_remedy() -> None:
    said: list[str] = []
    run = SimpleNamespace(say=lambda stage, text: said.append(f"{stage}: {text}"))
    losses = {
        name: {"heldout_before": 0.1, "heldout_loss": loss}
        for name, loss in zip("abc", (0.05, 0.1005, 0.2), strict=True)
    }
    show_risen(run, "width", losses, "width.lr", "name the others")
    show_risen(run, "width", {"a": losses["a"]}, "width.lr", "name the others")
    assert said == [
        "width: warning: 1 of 3 plugs is worse after training than before (c): lower width.lr, raise width.steps, or "
        "name the others"
    ]


def test_of_a_distance_more_is_a_drop(tmp_path: Path) -> None:
    rows = compared(SCORES | {"removed": 1.756}, lower_is_better=True)
    drops = {row.name: row.drop_percent for row in rows}
    assert drops == {
        "teacher": 0,
        "removed": pytest.approx(100),
        "ppcl-depth": 0,
        "ppcl-finetuned": pytest.approx(-100),
    }
    assert notes_of(rows, "distance")[:2] == [
        "score: distance, lower is better", "drop: the share of the teacher's score that is added to it"
    ]  # fmt: skip
    for row in (rows[1], compared(SCORES)[1]):
        row.save(tmp_path / "row.json", Header("ppcl.scores", {}), {})
        assert ScoreRow.load(tmp_path / "row.json").lower_is_better == row.lower_is_better
        assert ("lower_is_better" in (tmp_path / "row.json").read_text()) == row.lower_is_better
