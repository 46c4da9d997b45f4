"""Score a pruned model with the teacher in its place above a noise level, for several levels.

python -m experiments.recipes.noise_levels RUN [--variant ppcl-depth] [--sigmas 1 0.95 0.9] [--prompts 60]

RUN is the folder of a run with a trained variant; pictures and scores become sets of their own in it. Rows go to
noise_levels.csv beside this file, or in --output, as soon as they are measured. What it has is not measured again.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

import ppcl
from experiments.common import read_csv, write_csv
from experiments.recipes import report
from ppcl.command import prepare
from ppcl.pictures.scores import read_rows
from ppcl.report import plots

HERE = Path(__file__).parent

SIGMAS = (1.0, 0.97, 0.95, 0.9, 0.8, 0.6, 0.0)  # from the pruned model alone to the teacher alone
KEYS = ("run", "model", "variant", "made_from", "prompts", "above")


def facts_of(folder: Path, variant: str, sigma: float, prompts: int, repeats: int) -> tuple[list[str], dict[str, Any]]:
    """Return the command that scores one noise level, and what tells its row from others."""
    command = [
        f"run={folder}",
        "stages=[generate,evaluate]",
        f"generate.variants=[teacher,{variant}]",
        f"generate.teacher_above={sigma:g}",
        f"benchmark.prompts_per_category={prompts}",
        f"benchmark.latency_repeats={repeats}",
    ]
    run = prepare(command)
    from ppcl.pictures.images import variant_header
    from ppcl.variants.variants import variants_of

    (_, chosen), plugs = variants_of(run)
    made_from = variant_header(run, chosen, plugs).fingerprint
    model = run.config.model.name
    values = (folder.name, model, variant, made_from, prompts, f"{sigma:g}")
    return command, dict(zip(KEYS, map(str, values), strict=True))


def measure(command: list[str]) -> dict[str, Any]:
    """Draw and score the pictures of one noise level, and return the measured columns of its row."""
    ppcl.run(command)
    teacher, row = read_rows(prepare(command))
    return {
        "teacher_share": row.teacher_share,
        "latency_ratio": row.latency_ms / teacher.latency_ms,
        "params_ratio": row.params_ratio,
        "score": None if row.scores is None else row.scores.overall,
        "score_interval": row.score_interval,
        "teacher_score": None if teacher.scores is None else teacher.scores.overall,
        "drop_percent": row.drop_percent,
        "velocity_error": row.velocity_error,
        "latent_distance": row.latent_distance,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def plot(path: Path, rows: list[dict[str, str]]) -> None:
    """Plot score against time for a picture, a line for each run and variant, with the noise level at each point."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    lines: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if row["score"]:
            lines.setdefault(f"{row['variant']} of {row['run']}", []).append(row)
    for number, (name, line) in enumerate(lines.items()):
        line = sorted(line, key=lambda row: -float(row["above"]))
        x, y, margins = ([float(row[key] or 0) for row in line] for key in ("latency_ratio", "score", "score_interval"))
        axis.errorbar(x, y, margins, fmt="o-", color=plots.PALETTE[number], label=name, capsize=3)
        for row, place, top, margin in zip(line, x, y, margins, strict=True):
            above = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
            axis.annotate(row["above"], (place, top + margin), **above)
    axis.set(xlabel="time for a picture, relative to the teacher", ylabel="overall score", ylim=(-0.05, 1.05))
    axis.set_title("The teacher draws above the noise level at each point", loc="left", color=plots.INK)
    axis.legend(loc="lower right")
    plots.save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--variant", default="ppcl-depth")
    parser.add_argument("--sigmas", type=float, nargs="+", default=SIGMAS)
    parser.add_argument("--prompts", type=int, default=60, help="prompts per category")
    parser.add_argument("--repeats", type=int, default=50, help="timed denoising steps")
    parser.add_argument("--output", type=Path, default=HERE)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    table = given.output / "noise_levels.csv"
    rows: list[dict[str, Any]] = list(read_csv(table)) if table.exists() else []
    for sigma in given.sigmas:
        command, facts = facts_of(given.run, given.variant, sigma, given.prompts, given.repeats)
        if any(facts.items() <= row.items() for row in rows):
            continue
        rows.append(facts | measure(command))
        write_csv(table, rows)
        print({key: rows[-1][key] for key in ("above", "teacher_share", "latency_ratio", "score")}, flush=True)
    plot(given.output / "noise_levels.png", list(read_csv(table)))
    found = report.neighbours(given.output)
    print(found["noise_levels"])
    report.fill(given.output / "README.md", found)


if __name__ == "__main__":
    main()
