"""Tables and plots of the comparison, from the rows of results.csv alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.recipes.report import fill, number, spread, table
from experiments.recipes.table import Row, select
from experiments.table1_comparison.cells import EVERY_SIZE, ONCE, SIZES, TEACHERS, TRAINED, UNTRAINED, Entry
from ppcl.report import plots

OURS = ("ppcl", "ppcl_lp_a", "ours", "paper", "greedy", "greedy_spread")


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Write the plots of all rows, and put the tables into the README of `folder` if it has one."""
    tables = {"untrained": untrained_tables(rows), "trained": trained_tables(rows), "sizes": sizes_table(rows)}
    fill(folder / "README.md", tables)
    groups = [(size, "untrained", UNTRAINED) for size in SIZES]
    groups += [(size, equal, TRAINED) for size in SIZES for equal in kinds(rows)]
    for size, equal, entries in groups:
        found = [row for row in select(rows, size=size) if kind_of(row) == equal and row["score"]]
        if found:
            path = folder / f"{equal.replace(' ', '_')}_{100 * size:.0f}.png"
            drops_plot(path, found, entries, f"{100 * size:.0f}% of the parameters, {equal}")


def kind_of(row: Row) -> str:
    """Return what rows are compared by: `untrained`, `equal samples` or `equal time`."""
    if row["equal"].endswith("min"):
        return "equal time"
    return "equal samples" if row["equal"].endswith("steps") else "untrained"


def kinds(rows: Sequence[Row]) -> list[str]:
    """Return the kinds of trained rows that there are."""
    return [kind for kind in ("equal samples", "equal time") if any(kind_of(row) == kind for row in rows)]


def untrained_tables(rows: Sequence[Row]) -> str:
    """Return a table for each size: the drop and the velocity error of every method on every teacher."""
    parts = []
    for size in SIZES:
        found = [row for row in select(rows, size=size) if kind_of(row) == "untrained"]
        header = ["blocks chosen by"]
        for teacher in TEACHERS:
            header += [f"{teacher.removeprefix('tiny_')}: drop %", "error"]
        lines = []
        for name, entry in UNTRAINED.items():
            line = [entry.label]
            for teacher in TEACHERS:
                own = select(found, entry=name, teacher=teacher)
                line += [spread(own, "drop_percent", 1), spread(own, "velocity_error", None)]
            lines.append(line)
        lines = [
            [f"**{cell}**" if cell in _least(lines, place) else cell for place, cell in enumerate(line)]
            for line in lines
        ]
        parts += [f"**{100 * size:.0f}% of the parameters**, no training:", table(header, lines)]
    return "\n\n".join(parts)


def _least(lines: Sequence[Sequence[str]], place: int) -> set[str]:
    """Return the least number in a column, as it is written; nothing for the column of names."""
    values = [line[place] for line in lines if place and line[place] != "-"]
    return {min(values, key=lambda value: float(value.split(" ")[0]))} if values else set()


def trained_tables(rows: Sequence[Row]) -> str:
    """Return a table like the paper's first for each size, teacher and kind of comparison."""
    parts = []
    for kind in kinds(rows):
        for size in SIZES:
            for teacher in TEACHERS:
                found = [row for row in select(rows, size=size, teacher=teacher) if kind_of(row) == kind]
                if found:
                    parts += [
                        f"`{teacher}`, {100 * size:.0f}% of the parameters, {kind} ({_said(found)}):",
                        trained_table(found),
                    ]
    return "\n\n".join(parts)


def _said(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(row["equal"] for row in rows))


def trained_table(rows: Sequence[Row]) -> str:
    """Return a row for each entry: size, memory and latency relative to the teacher's, scores by category, and R."""
    categories = list(next((_categories(row) for row in rows if row["categories"]), {}))
    header = ["method", "seeds", "parameters", "memory", "latency", "error", *categories, "score", "R. %", "seconds"]
    lines = []
    for name, entry in TRAINED.items():
        own = select(rows, entry=name)
        if not own:
            continue
        if all(row["remark"] for row in own):
            lines.append([entry.label, str(len(own)), own[0]["remark"], *["-"] * (len(header) - 3)])
            continue
        shares = [spread(own, f"{what}_ratio", 2) for what in ("params", "memory", "latency")]
        found = [_categories(row) for row in own if row["categories"]]
        means = [f"{sum(each[category] for each in found) / len(found):.2f}" for category in categories]
        error, score = spread(own, "velocity_error", None), spread(own, "score", 3)
        drop, seconds = spread(own, "drop_percent", 1), spread(own, "training_seconds", 0)
        lines.append([entry.label, str(len(own)), *shares, error, *means, score, drop, seconds])
    return table(header, lines)


def sizes_table(rows: Sequence[Row]) -> str:
    """Return a row for each entry that has all of four sizes: what these cost in all, and the drop of each."""
    header = ["method", "choosing, s", "training, s", *(f"R. % at {100 * size:.0f}%" for size in EVERY_SIZE)]
    lines = []
    for name, entry in (ONCE | TRAINED).items():
        found = [row for row in select(rows, entry=name, teacher=TEACHERS[0]) if kind_of(row) == "equal samples"]
        own = [select(found, size=size)[:1] for size in EVERY_SIZE]  # of the first seed
        if not all(own):
            continue
        costs = [_cost(row) for (row,) in own]
        once = max(shared for *_, shared in costs)
        choosing = costs[0][0] if entry.once else sum(chosen for chosen, *_ in costs)
        training = once + sum(seconds - shared for _, seconds, shared in costs)
        drops = [spread(row, "drop_percent", 1) if row[0]["score"] else row[0]["remark"] for row in own]
        lines.append([entry.label, number(choosing, 0), number(training, 0), *drops])
    return table(header, lines) if lines else "Not measured yet."


def _cost(row: Row) -> tuple[float, float, float]:
    """Return the seconds of choosing and of training, and those of the latter that all sizes share."""
    chosen, trained, shared = (float(row[key] or 0) for key in ("choosing_seconds", "training_seconds", "once_seconds"))
    return chosen, trained, shared


def _categories(row: Row) -> dict[str, float]:
    return {name: float(value) for name, _, value in (each.partition("=") for each in row["categories"].split())}


def drops_plot(path: Path, rows: Sequence[Row], entries: Mapping[str, Entry], title: str) -> None:
    """Draw the drop of every entry, a panel for each teacher; the least drop is at the top."""
    teachers = [teacher for teacher in TEACHERS if select(rows, teacher=teacher)]
    figure, axes = plt.subplots(
        1, len(teachers), figsize=(0.8 + 3.2 * len(teachers), 0.9 + 0.27 * len(entries)), squeeze=False
    )
    for axis, teacher in zip(axes[0], teachers, strict=True):
        means = {}
        for name in entries:
            drops = [
                float(row["drop_percent"]) for row in select(rows, entry=name, teacher=teacher) if row["drop_percent"]
            ]
            if drops:
                means[name] = (sum(drops) / len(drops), min(drops), max(drops))
        order = sorted(means, key=lambda name: -means[name][0])
        colors = [plots.PALETTE[0] if name in OURS else plots.PALETTE[5] for name in order]
        axis.barh([entries[name].label for name in order], [means[name][0] for name in order], color=colors)
        for place, name in enumerate(order):
            mean, low, high = means[name]
            if high > low:
                axis.plot([low, high], [place, place], color="black", linewidth=1)
            axis.annotate(
                number(mean, 1), (max(high, 0), place), (3, 0), textcoords="offset points", va="center", fontsize=7
            )
        axis.set(title=teacher, xlabel="drop of the score, %")
        axis.margins(x=0.15)
    figure.suptitle(title)
    plots.save_figure(figure, path)
