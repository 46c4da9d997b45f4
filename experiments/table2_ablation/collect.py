"""Write results.csv from the runs of the sweep (a row per variant, seed and fine-tuning), and draw the plot."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import yaml

from experiments.common import mean_and_spread, write_csv
from ppcl.data.worlds.shapes import CATEGORIES
from ppcl.report import plots

HERE = Path(__file__).parent

# In the paper's order. From `dp` on, each row adds something to the row before it.
LABELS = {
    "baseline": "baseline (CKA sensitivity)",
    "lp_a": "LP-a",
    "lp": "LP",
    "lp_b": "LP-b",
    "dp": "LP + DP",
    "wp_text": "+ WP-text",
    "wp_ffn": "+ WP-ffn",
}


def read(folder: Path, pattern: str) -> dict[str, dict]:
    """Return the contents of the JSON files under `folder` that match `pattern`, by their names without suffix."""
    return {path.stem: json.loads(path.read_text()) for path in folder.glob(pattern)}


def row_of(folder: Path, label: str, base: Path | None = None) -> dict:
    """Return the scores and training costs of the run in `folder`.

    If run `base` trained the plugs, the costs of its trainings are included.
    """
    config = yaml.safe_load((folder / "config.yaml").read_text())
    scores = read(folder, "scores/*.json")
    spent = [*read(folder, "training/*.json").values(), *(read(base, "training/*.json").values() if base else [])]
    teacher = scores.pop("teacher")
    (row,) = scores.values()
    overall = row["scores"]["overall"]
    return {
        "variant": label,
        "seed": config["data"]["train_seed"],
        "finetune_steps": config["finetune"]["steps"] if base else 0,
        "num_layers": row["num_layers"],
        "params_ratio": row["params"] / teacher["params"],
        **{category: row["scores"][category] for category in CATEGORIES},
        "overall": overall,
        "drop_percent": 100 * (1 - overall / teacher["scores"]["overall"]),
        "train_seconds": sum(cost["seconds"] for cost in spent),
        "train_peak_mb": max(cost["peak_memory_mb"] for cost in spent),
    }


def rows_of(runs: Path, label: str) -> list[dict]:
    """Return a row per finished run under `runs`/`label`.

    Folders are called `<seed>` before fine-tuning, and `<seed>-<steps>` after it.
    """
    rows = []
    for folder in sorted(runs.glob(f"{label}/[0-9]*")):
        if len(list(folder.glob("scores/*.json"))) == 2:
            seed, _, tuned = folder.name.partition("-")
            rows.append(row_of(folder, label, folder.with_name(seed) if tuned else None))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs/table2"))
    runs = parser.parse_args().runs
    rows = [row for label in LABELS for row in rows_of(runs, label)]
    write_csv(HERE / "results.csv", rows)

    figure, axis = plt.subplots(figsize=(7.2, 3.6))
    budgets = sorted({row["finetune_steps"] for row in rows})
    for number, budget in enumerate(budgets):
        found = {
            label: mean_and_spread(values)
            for label in LABELS
            if (values := [r["overall"] for r in rows if r["variant"] == label and r["finetune_steps"] == budget])
        }
        for label, (mean, spread) in found.items():
            print(f"{LABELS[label]:<28} {budget:>5} fine-tuning steps: {mean:.3f} +- {spread:.3f}")
        axis.errorbar(
            [mean for mean, _ in found.values()],
            [LABELS[label] for label in found],
            xerr=[spread for _, spread in found.values()],
            fmt="o",
            color=plots.PALETTE[number],
            capsize=3,
            label=f"tuned for {budget} steps" if budget else "as distilled",
        )
    axis.set(xlabel="overall score", xlim=(0, 0.9))
    axis.invert_yaxis()  # the paper's order, from the top
    axis.legend(loc="lower center", bbox_to_anchor=(0.35, 1.0), ncols=len(budgets))
    plots.save_figure(figure, HERE / "table2.png")


if __name__ == "__main__":
    main()
