"""Tune models of random blocks: does their error before tuning tell which of them has the least error after it?

    python -m experiments.random_subsets.run --minutes 55

Every subset of blocks is a row of results.csv beside this file. Those that the table has are not measured again, so the
command can be stopped at any time and given again. It begins no further subset after `--minutes`.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from scipy.stats import rankdata, spearmanr

from experiments.common import SEEDS
from experiments.recipes.cells import Sitting
from experiments.recipes.report import fill, number, plain_log, table
from experiments.recipes.table import Row, Table, select
from experiments.table1_comparison.cells import Cell, Entry, run_stages
from ppcl.artifacts.files import read_json
from ppcl.artifacts.plan import plug_name
from ppcl.context import Run
from ppcl.report import plots

HERE = Path(__file__).parent
TEACHERS = ("tiny_dit", "tiny_qwen_image")
SIZE = 0.51  # of the parameters, which 10 of 20 blocks meet

KEYS = ("teacher", "digest", "steps", "subset")
COLUMNS = (*KEYS, "before", "after", "intervals", "minutes", "shared", "date", "commit", "made_from")


def subset_cell(teacher: str, subset: int, steps: int) -> Cell:
    """Return the cell of a teacher that loses random blocks, which the number `subset` draws, and is tuned.

    All subsets are tuned on the same samples in the same way.
    """
    choose = ("method=random", f"method.settings.seed={subset}")
    entry = Entry("random", choose, recover=("distill.mode=none",))
    return Cell("random_subset", entry, teacher, SIZE, SEEDS[0], (0, steps), f"{steps} steps")


def measured_row(sitting: Sitting, teacher: str, subset: int, steps: int) -> dict[str, str] | None:
    """Return the row of a subset, which is measured now if the table does not have it.

    None is returned while another process measures it.
    """
    cell = subset_cell(teacher, subset, steps)
    run = cell.run(1)
    made_from = cell.made_from(run)
    keys = dict(zip(KEYS, (teacher, run.teacher.identity["weights"], steps, subset), strict=True))
    found = sitting.table.find(**keys, made_from=made_from)
    return found or sitting.claim(sitting.table, keys, made_from, run.folder, lambda: _figures(cell, run))


def _figures(cell: Cell, run: Run) -> dict[str, Any]:
    """Tune a subset, and return its held-out velocity error before and after."""
    run_stages(cell, run, 1, "detect,finetune")
    folder = run.folder / "finetuned"
    errors = read_json(folder / "ppcl.json", "The record of the tuned model")["velocity_error"]
    intervals = " ".join(plug_name(stack, pair) for stack, pairs in run.intervals.items() for pair in pairs)
    shutil.rmtree(folder)  # megabytes that nothing needs any more
    return {"before": errors["before"], "after": errors["after"], "intervals": intervals}


def groups(rows: Sequence[Row]) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Return the errors before and after tuning of all subsets of a teacher, by teacher and steps."""
    found = {}
    for teacher, digest, steps in dict.fromkeys((row["teacher"], row["digest"], row["steps"]) for row in rows):
        own = select(rows, teacher=teacher, digest=digest, steps=steps)
        found[teacher, steps] = [float(row["before"]) for row in own], [float(row["after"]) for row in own]
    return found


def correlation(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Return Spearman's rank correlation and its p-value; NaN for fewer than three subsets."""
    if len(before) < 3:
        return math.nan, math.nan
    found = spearmanr(before, after)
    return float(found.statistic), float(found.pvalue)


def result_table(rows: Sequence[Row]) -> str:
    """Return a row for each teacher: the rank correlation, and what becomes of the subset that is best untuned."""
    header = [
        "teacher",
        "steps",
        "subsets",
        "rank correlation",
        "p",
        "error before",
        "after",
        "rank of the best before",
    ]
    lines = []
    for (teacher, steps), (before, after) in groups(rows).items():
        rank, chance = correlation(before, after)
        ranges = [f"{number(min(errors), None)} to {number(max(errors), None)}" for errors in (before, after)]
        place = int(rankdata(after, method="min")[before.index(min(before))])
        written = [number(rank, 2), "-" if math.isnan(chance) else f"{chance:.2g}", *ranges]
        lines.append([f"`{teacher}`", steps, str(len(before)), *written, f"{place} of {len(before)}"])
    return table(header, lines)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw the error after tuning against the error before, a panel for each teacher and number of steps."""
    found = groups(rows)
    figure, axes = plt.subplots(1, len(found), figsize=(0.6 + 3.8 * len(found), 3.6), squeeze=False)
    for axis, ((teacher, steps), (before, after)) in zip(axes[0], found.items(), strict=True):
        axis.plot(before, after, "o", color=plots.PALETTE[0], markersize=5)
        least = before.index(min(before))
        axis.plot(before[least], after[least], "o", color=plots.PALETTE[1], markersize=9, markerfacecolor="none")
        rank, _ = correlation(before, after)
        title = f"{teacher}: {len(before)} subsets, rank correlation {number(rank, 2)}"
        axis.set(xscale="log", xlabel="velocity error before tuning (ring: the least)", title=title)
        axis.set(yscale="log", ylabel=f"velocity error after {steps} steps")
        axis.title.set_fontsize(9)
        plain_log(axis.xaxis)
        plain_log(axis.yaxis)
    figure.tight_layout()
    plots.save_figure(figure, path)


def say(row: Mapping[str, str] | None) -> None:
    """Print a row on one line."""
    if row is not None:
        print("  ".join(f"{key} {row[key]}" for key in ("teacher", "steps", "subset", "before", "after")), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--subsets", type=int, default=30, help="random subsets of each teacher")
    parser.add_argument("--steps", type=int, default=200, help="of tuning")
    parser.add_argument("--minutes", type=float, default=55.0, help="after which no further subset is begun")
    parser.add_argument("--alone", action="store_true", help="rows say that nothing else ran on the machine")
    parser.add_argument("--plot", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, default=HERE, help="the folder of results.csv, table and plot")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sitting = Sitting(Table(given.output / "results.csv", COLUMNS, KEYS), 0, not given.alone)
    end = time.monotonic() + 60 * given.minutes
    wanted = [(teacher, subset) for subset in range(given.subsets) for teacher in given.teacher]
    for teacher, subset in [] if given.plot else wanted:
        if time.monotonic() > end:
            print("time is up: give the command again to go on", flush=True)
            break
        say(measured_row(sitting, teacher, subset, given.steps))
    rows = sitting.table.rows
    if rows:
        fill(given.output / "README.md", {"result": result_table(rows)})
        plot(given.output / "correlation.png", rows)
        print(result_table(rows), flush=True)


if __name__ == "__main__":
    main()
