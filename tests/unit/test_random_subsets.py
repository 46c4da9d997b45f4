"""The experiment on random subsets: what it runs, and what it makes of its rows."""

from __future__ import annotations

import csv
from pathlib import Path

from experiments.random_subsets.run import COLUMNS, main, result_table, subset_cell


def row(teacher: str, subset: int, before: float, after: float) -> dict[str, str]:
    facts = {"teacher": teacher, "digest": "d", "steps": 40, "subset": subset, "before": before, "after": after}
    return dict.fromkeys(COLUMNS, "") | {key: str(value) for key, value in facts.items()}


ROWS = [
    *(row("tiny_dit", n, *pair) for n, pair in enumerate([(0.1, 0.04), (0.2, 0.03), (0.3, 0.02), (0.4, 0.01)])),
    *(row("tiny_qwen_image", n, *pair) for n, pair in enumerate([(0.1, 0.01), (0.2, 0.02)])),
]


def test_each_subset_is_drawn_by_its_number_and_tuned_alike() -> None:
    first, second = (subset_cell("tiny_dit", subset, 40).overrides(1, "detect,finetune") for subset in (0, 1))
    assert {*first} ^ {*second} == {"method.settings.seed=0", "method.settings.seed=1"}
    assert {"distill.mode=none", "finetune.steps=40", "method.params=0.51"} < {*first}


def test_the_table_has_rank_correlations_with_their_counts() -> None:
    dit, qwen = result_table(ROWS).splitlines()[2:]
    assert dit.startswith("| `tiny_dit` | 40 | 4 | -1.00 | 0 | 0.100 to 0.400 | 0.0100 to 0.0400 | 4 of 4 |")
    assert qwen.startswith("| `tiny_qwen_image` | 40 | 2 | - | - |")  # two subsets have no rank correlation to speak of


def test_table_and_plot_are_made_of_the_rows_alone(tmp_path: Path) -> None:
    with (tmp_path / "results.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(ROWS)
    (tmp_path / "README.md").write_text("<!-- result -->\n<!-- end of result -->\n", encoding="utf-8")
    main(["--plot", "--output", str(tmp_path)])
    assert "| `tiny_dit` | 40 |" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "correlation.png").stat().st_size
