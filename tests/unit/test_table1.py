"""The comparison of ways to prune: its cells, and the tables that are made of its rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.common import read_csv
from experiments.table1_comparison import report
from experiments.table1_comparison.cells import (
    COLUMNS,
    EVERY_SIZE,
    ONCE,
    TRAINED,
    UNTRAINED,
    Cell,
    equal_time,
    halves,
    once,
    trained,
    within,
)


def row(**facts: object) -> dict[str, str]:
    return dict.fromkeys(COLUMNS, "") | {key: str(value) for key, value in facts.items()}


def test_measured_rows_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new key of the configuration must not make the command measure for days what it has measured."""
    monkeypatch.chdir(tmp_path)
    measured = next(row for row in read_csv(Path(report.__file__).parent / "results.csv") if row["entry"] == "bk_sdm")
    cell = Cell("bk_sdm", UNTRAINED["bk_sdm"], measured["teacher"], float(measured["size"]))
    assert cell.made_from(cell.run(prompts=60)) == measured["made_from"]


def test_students_get_their_share_of_the_steps() -> None:
    assert halves(TRAINED["ours"], 500) == (250, 250)
    assert halves(TRAINED["tinyfusion"], 500) == (0, 500)


def test_equal_time_goes_by_the_measured_speed() -> None:
    slow = row(local_steps=0, tuning_steps=500, training_seconds=1000.0)
    assert equal_time(TRAINED["tinyfusion"], slow, 500.0) == (0, 250)
    cell = within(trained("tinyfusion", "tiny_flux", 0.71, 10, 500), slow, 500.0)
    assert (cell.steps, cell.equal) == ((0, 250), "8.33 min")


def test_a_trained_cell_names_the_variant_that_it_scores() -> None:
    assert trained("ours", "tiny_flux", 0.71, 10, 500).variant == "ppcl-finetuned"
    assert Cell("ppcl", UNTRAINED["ppcl"], "tiny_flux", 0.71).variant == "ppcl-planned"
    assert Cell("bk_sdm", UNTRAINED["bk_sdm"], "tiny_flux", 0.71).variant == "removed"


def test_a_training_that_serves_every_size_is_counted_once() -> None:
    facts = {"entry": "once_tuned", "teacher": "tiny_qwen_image", "equal": "500 steps", "seed": 10, "score": 0.8}
    facts |= {"choosing_seconds": 7, "training_seconds": 150, "once_seconds": 100, "drop_percent": 4.0}
    rows = [row(**facts, size=size) for size in EVERY_SIZE]
    assert "| PPCL, trained once, each size tuned | 7 | 300 | 4.0 | 4.0 | 4.0 | 4.0 |" in report.sizes_table(rows)
    assert report.sizes_table(rows[1:]) == "Not measured yet."


def test_all_sizes_take_their_parts_from_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = [once(name, "tiny_qwen_image", size, 10, 500) for name in ONCE for size in EVERY_SIZE[:2]]
    assert len({cell.first(60).folder for cell in cells}) == 1
    assert len({cell.run(60).folder for cell in cells} | {cells[0].first(60).folder}) == len(cells) + 1
    assert {cell.variant for cell in cells} == {"ppcl-planned", "ppcl-finetuned"}


def test_greedy_removals_are_tuned_without_students() -> None:
    cell = trained("greedy", "tiny_flux", 0.71, 10, 500)
    assert cell.steps == (0, 500)
    assert "distill.mode=none" in cell.overrides(1, "finetune")


def test_the_least_drop_of_a_teacher_is_bold() -> None:
    facts = {"teacher": "tiny_dit", "size": 0.71, "equal": "untrained", "velocity_error": 0.1}
    rows = [row(entry="bk_sdm", drop_percent=5.0, **facts), row(entry="random", drop_percent=50.0, **facts)]
    table = report.untrained_tables(rows)
    assert "**5.0**" in table
    assert "**50.0**" not in table


def test_a_table_like_the_papers_has_the_mean_over_seeds() -> None:
    facts = {"entry": "ours", "teacher": "tiny_flux", "size": 0.71, "equal": "500 steps", "params_ratio": 0.7}
    facts |= {"memory_ratio": 0.7, "latency_ratio": 0.7, "velocity_error": 0.01, "training_seconds": 60}
    rows = [
        row(**facts, seed=seed, score=score, drop_percent=100 * (1 - score), categories=f"colors={score:.3f}")
        for seed, score in ((10, 0.8), (11, 0.9))
    ]
    table = report.trained_tables(rows)
    assert "equal samples (500 steps)" in table
    assert "| PPCL, our recipe | 2 | 0.70 | 0.70 | 0.70 | 0.0100 | 0.85 | 0.850 ± 0.071 | 15.0 ± 7.1 | 60 |" in table


def test_what_could_not_be_measured_says_why() -> None:
    facts = {"entry": "ours", "teacher": "tiny_flux", "size": 0.51, "equal": "500 steps", "seed": 10}
    assert "out of reach" in report.trained_tables([row(**facts, remark="budget.params=0.51 is out of reach")])
