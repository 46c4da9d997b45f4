"""Tables and plots of `experiments.recipes`, made from the rows of its CSV files alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from experiments.common import SEEDS, mean_and_spread, read_csv
from experiments.recipes.cells import BY_STEPS, RECIPES, configured_rate, steps_within
from experiments.recipes.chains import EQUAL, PARTS, PLANNED
from experiments.recipes.table import Row, as_text, select
from ppcl.artifacts.files import atomic_path
from ppcl.report import plots

UNITS = {"distill.relative_update": "relative update", "distill.lr": "AdamW's learning rate"}
COLORS = {"per token": plots.PALETTE[0], "direction": plots.PALETTE[1], "removed": plots.PALETTE[5]}
LOSSES = {
    "standard": "per token", "per-token-adamw": "per token", "paper": "direction", "direction-muon": "direction",
}  # fmt: skip


# Choosing rows


def teachers_of(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Return every teacher and digest in the rows, the newest digest of a teacher first."""
    found = [*dict.fromkeys((row["teacher"], row["digest"]) for row in rows)][::-1]
    order = [*dict.fromkeys(row["teacher"] for row in rows)]
    return sorted(found, key=lambda pair: order.index(pair[0]))


def tried(rows: Sequence[Row], teacher: str, digest: str, recipe: str, steps: int) -> list[Row]:
    """Return the rows of the group `rates` for one recipe, in the order of its rates."""
    facts = {"way": "local", "teacher": teacher, "digest": digest, "recipe": recipe, "steps": steps}
    found = select(rows, **facts, seed=SEEDS[0], budget=BY_STEPS)
    listed = [as_text(rate) for rate in RECIPES[recipe].rates]
    return sorted((row for row in found if row["rate"] in listed), key=lambda row: listed.index(row["rate"]))


def best(rows: Sequence[Row]) -> Row:
    """Return the row with the least velocity error; within one set of students it orders recipes as the score does."""
    return min(rows, key=lambda row: math.inf if math.isnan(float(row["error"])) else float(row["error"]))


def within(rows: Sequence[Row], minutes: float, steps: int, **facts: Any) -> list[Row]:
    """Return, for every seed, the row of a training of `steps` that fits into `minutes`, else the one cut to these."""
    cut = select(rows, **facts, budget=f"{minutes:g} min")
    whole = [
        row
        for row in select(rows, **facts, steps=steps, budget=BY_STEPS)
        if row["seed"] not in {other["seed"] for other in cut} and steps_within(minutes, row, rows) == steps
    ]
    return sorted([*cut, *whole], key=lambda row: row["seed"])


def compared(rows: Sequence[Row], teacher: str, digest: str, steps: int) -> dict[str, tuple[str, str]]:
    """Return the recipes of the groups `local` and `subsets`, each with its rate, by label."""
    found = {}
    for recipe, label in (("standard", "ours"), ("paper", "the paper's")):
        found[label] = recipe, as_text(configured_rate(teacher, recipe))
    options = tried(rows, teacher, digest, "paper", steps)
    if len(options) == len(RECIPES["paper"].rates):
        found["the paper's at its best rate"] = "paper", best(options)["rate"]
    return found


# Tables


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def number(value: str | float, digits: int | None) -> str:
    """Return a number of a row with so many decimals, None for three significant digits; `-` where there is none."""
    if value == "" or math.isnan(float(value)):
        return "-"
    return f"{float(value):.{_decimals(float(value)) if digits is None else digits}f}"


def _decimals(value: float) -> int:
    return max(0, 2 - math.floor(math.log10(value))) if 0 < value < math.inf else 1


def spread(rows: Sequence[Row], key: str, digits: int | None) -> str:
    """Return the mean over rows, written as by `number`, with the standard deviation if the rows differ."""
    values = [float(row[key]) for row in rows if row[key]]
    if not values:
        return "-"
    mean, deviation = mean_and_spread(values)
    digits = _decimals(mean) if digits is None else digits
    return number(mean, digits) + (f" ± {deviation:.{digits}f}" if len({*values}) > 1 else "")


def heading(rows: Sequence[Row], teacher: str, digest: str) -> str:
    """Return a line on a teacher, and on the removal of the same blocks."""
    facts = {"teacher": teacher, "digest": digest}
    whole, removed = (select(rows, **facts, way=way) for way in ("teacher", "removed"))
    line = f"`{teacher}` (weights {digest[:8]})"
    if whole:
        line += f", score {number(whole[-1]['score'], 3)}"
    if removed:
        row = removed[-1]
        line += (
            f". {100 * float(row['params_ratio']):.0f}% of the parameters are left. The same blocks removed: error "
            f"{number(row['error'], None)}, score {number(row['score'], 3)}, drop {number(row['drop_percent'], 1)}%"
        )
    return line + "."


def rates_table(rows: Sequence[Row], steps: int) -> str:
    """Return the tables of the group `rates`: error and score of every recipe at every rate, its best rate bold."""
    parts = []
    for teacher, digest in teachers_of(rows):
        lines: dict[str, list[list[str]]] = {}
        for name, recipe in RECIPES.items():
            found = tried(rows, teacher, digest, name, steps)
            if not found:
                continue
            top = best(found)
            cells = []
            for rate in recipe.rates:
                row = next(iter(select(found, rate=rate)), None)
                if row is None:
                    cells.append("")
                elif row["remark"]:
                    cells.append(row["remark"])
                else:
                    text = f"{number(row['error'], None)} ({number(row['score'], 2)})"
                    cells.append(f"**{text}**" if row is top else text)
            costs = [
                number(top["drop_percent"], 1),
                spread(found, "seconds", 0).split(" ")[0],
                number(top["peak_mb"], 1),
            ]
            lines.setdefault(recipe.rate, []).append([recipe.label, *cells, *costs])
        if not lines:
            continue
        parts.append(heading(rows, teacher, digest))
        for key, found_lines in lines.items():
            rates = next(recipe.rates for recipe in RECIPES.values() if recipe.rate == key)
            header = [f"error (score) by {UNITS[key]}", *(f"{rate:g}" for rate in rates)]
            parts.append(table([*header, "drop %", "seconds", "peak MB"], found_lines))
    return "\n\n".join(parts)


def local_table(rows: Sequence[Row], steps: int, budgets: Mapping[str, tuple[int, float]]) -> str:
    """Return the table of the group `local`. `budgets`: steps and minutes by name."""
    parts = []
    for teacher, digest in teachers_of(rows):
        lines = []
        recipes = compared(rows, teacher, digest, steps)
        for budget, (most, minutes) in budgets.items():
            facts = {"way": "local", "teacher": teacher, "digest": digest}
            found = {
                label: within(rows, minutes, most, **facts, recipe=recipe, rate=rate)
                for label, (recipe, rate) in recipes.items()
            }
            papers = [float(row["peak_mb"]) for row in found["the paper's"] if row["peak_mb"]]
            for label, chosen in found.items():
                if not chosen:
                    continue
                ended = ", ".join(dict.fromkeys(f"{row['steps']} ({row['budget']})" for row in chosen))
                peaks = [float(row["peak_mb"]) for row in chosen if row["peak_mb"]]
                ratio = f"{max(peaks) / max(papers):.2f}" if peaks and papers else "-"
                shown = [spread(chosen, key, digits) for key, digits in LOCAL_COLUMNS.items()]
                lines.append([budget, f"{label}, {float(recipes[label][1]):g}", ended, str(len(chosen)), *shown, ratio])
        if lines:
            parts.append(heading(rows, teacher, digest))
            header = ("budget", "recipe, rate", "steps (ended by)", "seeds", "error", "score", "drop %", "seconds")
            parts.append(table((*header, "peak MB", "of the paper's"), lines))
    return "\n\n".join(parts)


LOCAL_COLUMNS = {"error": None, "score": 3, "drop_percent": 1, "seconds": 0, "peak_mb": 1}
PLANNED_COLUMNS = {"blocks": 0, "params_ratio": 3} | LOCAL_COLUMNS


def subset_errors(rows: Sequence[Row], subsets: Sequence[Row], teacher: str, digest: str, steps: int) -> dict[str, Any]:
    """Return the errors of random subsets by subset, for each compared recipe and for removal, by label."""
    found = {}
    labels = compared(rows, teacher, digest, steps) | {"removed": ("", "")}
    for label, (recipe, rate) in labels.items():
        chosen = select(subsets, teacher=teacher, digest=digest, recipe=recipe, rate=rate)
        if chosen:
            newest = select(chosen, steps=chosen[-1]["steps"], seed=chosen[-1]["seed"])
            found[label] = {row["subset"]: float(row["error"]) for row in newest}
    return found


def subsets_table(rows: Sequence[Row], subsets: Sequence[Row], steps: int) -> str:
    """Return the table of the group `subsets`. Ratios are over the subsets that both recipes have."""
    lines = []
    for teacher, digest in teachers_of(subsets):
        errors = subset_errors(rows, subsets, teacher, digest, steps)
        papers = errors.get("the paper's", {})
        for label, by_subset in errors.items():
            both = [(by_subset[n], papers[n]) for n in by_subset if n in papers]
            ratio = f"{sum(a for a, _ in both) / sum(b for _, b in both):.3f}" if both else "-"
            lower = f"{sum(a < b for a, b in both)} of {len(both)}" if both and by_subset is not papers else "-"
            mean = number(sum(by_subset.values()) / len(by_subset), None)
            lines.append([f"`{teacher}` ({digest[:8]})", label, str(len(by_subset)), mean, ratio, lower])
    header = ("teacher", "recipe", "subsets", "mean error", "of the paper's mean", "lower than the paper's")
    return table(header, lines) if lines else ""


def costs_table(rows: Sequence[Row]) -> str:
    """Return what a cell costs, in minutes with drawing and scoring, by teacher and length of training."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["way"], row["teacher"], row["steps"], row["shared"]), []).append(row)
    lines = []
    for (way, teacher, steps, shared), found in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1])):
        count, seconds = str(len(found)), spread(found, "seconds", 0)
        lines.append([way, f"`{teacher}`", steps, shared, count, seconds, spread(found, "minutes", 1)])
    return table(("way", "teacher", "steps", "shared machine", "cells", "seconds of training", "minutes a cell"), lines)


# Chains of trainings


CHAIN_COLUMNS = {"seconds": 0, "peak_mb": 1, "error": None, "score": 3, "drop_percent": 1}
CHAIN_HEADER = ("seconds", "peak MB", "error", "score", "drop %")
LEAST = ("peak_mb", "error", "drop_percent")  # the lower the better; of the score it is the higher
LOCAL_ONLY = "local"
TUNED_LOCALLY = (LOCAL_ONLY, "local-lora", "local-tuned")

ByEntry = Mapping[str, Sequence[Row]]


def half_table(rows: Sequence[Row]) -> str:
    """Return the table of the group `half`."""
    lines = []
    for teacher, digest in teachers_of(select(rows, group="half")):
        found = select(rows, group="half", teacher=teacher, digest=digest)
        for budget in dict.fromkeys(row["budget"] for row in found):
            for name in dict.fromkeys(row["entry"] for row in found):
                chosen = select(found, budget=budget, entry=name)
                if chosen:
                    steps = ", ".join(dict.fromkeys("/".join(filter(None, _steps(row))) for row in chosen))
                    label = {"ours": "ours", "paper": "the paper's"}[name]
                    cells = [f"`{teacher}` ({digest[:8]})", label, budget, str(len(chosen)), steps]
                    cells += [minutes(chosen, f"{part}_seconds") for part in PARTS] + [minutes(chosen, "seconds")]
                    cells += [
                        spread(chosen, key, digits)
                        for key, digits in (("peak_mb", 1), ("error_before", None), ("error", None), ("score", 3))
                    ]
                    lines.append([*cells, spread(chosen, "drop_percent", 1)])
    header = (
        "teacher",
        "recipe",
        "within",
        "seeds",
        "steps of depth/width/tuning",
        "minutes: depth",
        "width",
        "tuning",
    )
    header += ("together", "peak MB", "error before tuning", "after", "score", "drop %")
    return table(header, lines) if lines else ""


def planned_table(cells: Sequence[Row], rows: Sequence[Row]) -> str:
    """Return the table of the group `planned`, with the students of the same training and seeds alone beside them.

    `cells`: rows of results.csv, which has these students.
    """
    lines = []
    for teacher, digest in teachers_of(select(rows, group="planned")):
        found = select(rows, group="planned", teacher=teacher, digest=digest)
        for budget in dict.fromkeys(row["budget"] for row in found):
            for name, entry in PLANNED.items():
                chosen = select(found, budget=budget, entry=name)
                if not chosen:
                    continue
                facts = {"way": "local", "teacher": teacher, "digest": digest, "recipe": entry.recipe}
                facts |= {"rate": chosen[0]["rate"], "steps": chosen[0]["depth_steps"], "budget": "steps"}
                seeds = {row["seed"] for row in chosen}
                alone = [row for row in select(cells, **facts) if row["seed"] in seeds and not entry.tuning]
                label = f"{entry.label}, {float(chosen[0]['rate']):g}"
                for plugs, these in (("students", alone), ("students and projectors", chosen)):
                    if these:
                        shown = [spread(these, key, digits) for key, digits in PLANNED_COLUMNS.items()]
                        lines.append([f"`{teacher}` ({digest[:8]})", budget, label, plugs, str(len(these)), *shown])
    header = ("teacher", "trained for", "recipe, rate", "what is plugged in", "seeds", "blocks", "parameters")
    return table((*header, "error", "score", "drop %", "seconds", "peak MB"), lines) if lines else ""


def minutes(rows: Sequence[Row], key: str) -> str:
    """Return the mean of a column of seconds, in minutes."""
    values = [float(row[key]) / 60 for row in rows if row[key]]
    return f"{mean_and_spread(values)[0]:.1f}" if values else "-"


def _steps(row: Row) -> list[str]:
    return [row[f"{part}_steps"] for part in PARTS]


def entries(rows: Sequence[Row], teacher: str, digest: str, limit: float) -> dict[str, list[Row]]:
    """Return the rows of the group `equal` within `limit` minutes, by entry."""
    found = select(rows, group="equal", teacher=teacher, digest=digest, budget=f"{limit:g} min")
    return {name: chosen for name in EQUAL if (chosen := select(found, entry=name))}


def average(rows: Sequence[Row], key: str) -> float | None:
    """Return the mean of a column over rows; None if one of them has no number there, such as a training diverged."""
    values = [float(row[key] or "nan") for row in rows]
    return None if any(map(math.isnan, values)) else mean_and_spread(values)[0]


def leader(found: ByEntry, key: str) -> str | None:
    """Return the entry with the best value in a column, the first of several; None if none has a value."""
    values = {name: value for name, rows in found.items() if (value := average(rows, key)) is not None}
    if not values:
        return None
    return min(values, key=lambda name: values[name] if key in LEAST else -values[name])


def equal_tables(rows: Sequence[Row], chains: Sequence[Row], budgets: Mapping[str, float]) -> str:
    """Return text and tables of the group `equal`. `budgets`: minutes by name."""
    parts = []
    for teacher, digest in teachers_of(select(chains, group="equal")):
        by_budget = {name: entries(chains, teacher, digest, limit) for name, limit in budgets.items()}
        by_budget = {name: found for name, found in by_budget.items() if found}
        if not by_budget:
            continue
        parts.append(heading(rows, teacher, digest))
        parts += [
            f"**{name.capitalize()}, {budgets[name]:g} minutes.** {verdict(by_budget[name])}" for name in by_budget
        ]
        for name, found in by_budget.items():
            title = f"`{teacher}`, {name}, equal time"
            parts.append(f"{title}:\n\n{equal_table(found)}")
        peaks = peak_table(by_budget)
        if peaks:
            parts.append(f"`{teacher}`, equal peak:\n\n{peaks}")
        costs = tuning_table(by_budget)
        if costs:
            parts.append(f"`{teacher}`, what tuning costs and gives:\n\n{costs}")
    return "\n\n".join(parts)


def marked(found: ByEntry, name: str, keys: Iterable[str], winners: Mapping[str, str | None]) -> list[str]:
    """Return the cells of an entry. Those are bold that read as the winner's."""
    cells = []
    for key in keys:
        best = winners.get(key)
        text, best_text = (spread(found[one], key, CHAIN_COLUMNS[key]) if one else "" for one in (name, best))
        cells.append(f"**{text}**" if text == best_text else text)
    return cells


def equal_table(found: ByEntry) -> str:
    """Return the table of one budget. The best of each column is bold, but for time, which is given."""
    winners = {key: leader(found, key) for key in CHAIN_COLUMNS if key != "seconds"}
    lines = []
    for name, chosen in found.items():
        steps = ", ".join(dict.fromkeys(" + ".join(filter(None, _steps(row))) for row in chosen))
        remark = next((f" ({row['remark']})" for row in chosen if row["remark"]), "")
        first = [EQUAL[name].label + remark, str(len(chosen)), steps or "-"]
        lines.append([*first, *marked(found, name, CHAIN_COLUMNS, winners)])
    return table(("trained by", "seeds", "steps", *CHAIN_HEADER), lines)


def factors(found: ByEntry) -> dict[str, float]:
    """Return the peak of every entry in units of that of ours, local only; empty if that is not known."""
    ours = average(found.get(LOCAL_ONLY, ()), "peak_mb") if found.get(LOCAL_ONLY) else None
    peaks = {name: average(chosen, "peak_mb") for name, chosen in found.items()}
    return {name: peak / ours for name, peak in peaks.items() if peak is not None} if ours else {}


def fitting(found: ByEntry) -> dict[str, Sequence[Row]]:
    """Return the entries whose peak is not above that of ours, local only."""
    return {name: found[name] for name, factor in factors(found).items() if factor <= 1}


def peak_table(by_budget: Mapping[str, ByEntry]) -> str:
    """Return the table of what fits into the peak of ours, local only. The best that fits is bold."""
    lines = []
    keys = ("error", "score", "drop_percent")
    for budget, found in by_budget.items():
        fits = fitting(found)
        winners = {key: leader(fits, key) for key in keys}
        for name, factor in factors(found).items():
            first = [budget, EQUAL[name].label, f"{factor:.2f}"]
            lines.append([*first, *(marked(fits, name, keys, winners) if name in fits else ["does not fit", "-", "-"])])
    header = ("budget", "trained by", "peak, of ours, local only", "error", "score", "drop %")
    return table(header, lines) if lines else ""


def tuning_table(by_budget: Mapping[str, ByEntry]) -> str:
    """Return the table of the memory and time of tuning, against what it gives."""
    lines = []
    for budget, found in by_budget.items():
        chosen = {name: found[name] for name in TUNED_LOCALLY if name in found}
        for name in chosen if len(chosen) > 1 else ():
            parts = [spread(chosen[name], f"{part}_{what}", digits) for part in ("depth", "finetune")
                     for what, digits in (("seconds", 0), ("peak_mb", 1))]  # fmt: skip
            before = spread(chosen[name], "error_before", None)
            lines.append(
                [budget, EQUAL[name].label, *parts, before, *marked(chosen, name, list(CHAIN_COLUMNS)[2:], {})]
            )
    header = ("budget", "trained by", "local: seconds", "peak MB", "tuning: seconds", "peak MB", "error before tuning")
    return table((*header, "error", "score", "drop %"), lines) if lines else ""


def verdict(found: ByEntry) -> str:
    """Return sentences that say which entry wins at equal time and within the peak of ours, local only."""
    by_error, by_score = leader(found, "error"), leader(found, "score")
    if by_error is None or by_score is None:
        return "Nothing to compare yet."
    sentences = [_won("At equal time", found, by_score, by_error)]
    close = level(found, by_score)
    if close:
        sentences.append(f"Within the noise of so many pictures of that score: {listed(close)}.")
    factor = factors(found).get(by_score)
    if factor is not None and factor > 1:
        sentences.append(f"The winner takes {factor:.2f} times the peak of ours, local only.")
    fits = fitting(found)
    fit_error, fit_score = leader(fits, "error"), leader(fits, "score")
    if len(fits) == 1 < len(found):
        sentences.append("Nothing else fits into the peak of ours, local only.")
    elif fit_score is not None and fit_error is not None:
        sentences.append(_won("Within the peak of ours, local only", fits, fit_score, fit_error))
    missing = [EQUAL[name].label for name in EQUAL if name not in found]
    if missing:
        sentences.append(f"Not measured yet: {listed(missing)}.")
    off = [EQUAL[name].label for name, chosen in found.items() if not _on_time(chosen)]
    if off:
        sentences.append(f"More than a tenth off the time: {listed(off)}.")
    return " ".join(sentences)


def _won(where: str, found: ByEntry, by_score: str, by_error: str) -> str:
    score = spread(found[by_score], "score", 3)
    error = spread(found[by_error], "error", None)
    names = f"**{EQUAL[by_score].label}** has the highest score ({score})"
    names += " and" if by_error == by_score else f", and **{EQUAL[by_error].label}**"
    ours = [EQUAL[name].is_ours for name in (by_score, by_error)]
    end = "ours wins" if all(ours) else "ours does not win" if not any(ours) else "ours wins one of the two"
    return f"{where} {names} the least error ({error}): {end}."


def level(found: ByEntry, best: str) -> list[str]:
    """Return the labels of entries whose score is less than two standard errors of the difference below the best."""
    top = average(found[best], "score") or 0.0
    near = []
    for name, chosen in found.items():
        score, count = average(chosen, "score"), min(map(_pictures, (chosen, found[best])))
        if name != best and score is not None and count:
            error = math.sqrt((top * (1 - top) + score * (1 - score)) / count)
            near += [EQUAL[name].label] if top - score < 2 * error else []
    return near


def _pictures(rows: Sequence[Row]) -> int:
    return sum(len(row["categories"].split()) * int(row["prompts"]) for row in rows)


def _on_time(rows: Sequence[Row]) -> bool:
    seconds = average(rows, "seconds")
    limit = 60 * float(rows[0]["budget"].removesuffix(" min"))
    return seconds is None or abs(seconds - limit) <= limit / 10


def listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence. They contain commas, so semicolons part them."""
    return "; ".join(words)


# Measurements beside this one


def neighbours(folder: Path) -> dict[str, str]:
    """Return the tables of `widths` and `noise_levels`, from their CSV files in `folder`; empty where there is none."""
    return {name: listing(folder / f"{name}.csv", *NEIGHBOURS[name]) for name in NEIGHBOURS}


# The columns of each: header, column of the CSV file, decimals (None: three significant digits; empty: as it is). Then
# the columns within which the least value is bold, and the column of that value.
NEIGHBOURS: dict[str, tuple[Sequence[tuple[str, str, int | str | None]], Sequence[str], str]] = {
    "widths": (
        (("of", "what", ""), ("channels", "channels", ""), ("steps", "steps", ""), ("RMS of weights", "rms", 3),
         ("relative update", "relative_update", ""), ("error before", "before", None), ("after", "after", None)),
        ("what", "channels", "steps"), "after",
    ),
    "noise_levels": (
        (("run", "run", ""), ("model", "model", ""), ("variant", "variant", ""), ("teacher above", "above", ""),
         ("teacher's share of steps", "teacher_share", 2), ("time for a picture", "latency_ratio", 2),
         ("score", "score", 3), ("drop %", "drop_percent", 1), ("error", "velocity_error", None)),
        (), "",
    ),
}  # fmt: skip


def listing(
    path: Path, columns: Sequence[tuple[str, str, int | str | None]], same: Sequence[str] = (), value: str = ""
) -> str:
    """Return a CSV file as a Markdown table; empty if there is no such file.

    `columns`: see `NEIGHBOURS`. `value`: its least is bold among the rows that have equal values in the columns `same`.
    """
    if not path.exists():
        return ""
    rows = read_csv(path)
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in same), []).append(row)
    least = [min(group, key=lambda row: float(row[value])) for group in groups.values()] if value else []
    lines = []
    for row in rows:
        cells = {key: row[key] if digits == "" else number(row[key], digits) for _, key, digits in columns}  # type: ignore[arg-type]
        if any(row is best for best in least):
            cells[value] = f"**{cells[value]}**"
        lines.append([*cells.values()])
    return table([header for header, _, _ in columns], lines)


def fill(path: Path, tables: Mapping[str, str]) -> None:
    """Replace what stands in a Markdown file between `<!-- NAME -->` and `<!-- end of NAME -->`, for every table.

    Does nothing if there is no such file. Raises `ValueError` for a table that has no place in it.
    """
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    for name, content in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
        text, count = re.subn(pattern, lambda found, new=content: f"{found[1]}{new}\n{found[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{path} has {count} places for the table {name}")
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# Plots


def plot_rates(path: Path, rows: Sequence[Row], steps: int) -> bool:
    """Plot error and score of every recipe against its rate, a row of panels for each teacher."""
    shown = [
        (teacher, digest) for teacher, digest in teachers_of(rows)
        if any(tried(rows, teacher, digest, name, steps) for name in RECIPES)
    ]  # fmt: skip
    if not shown:
        return False
    units = [*dict.fromkeys(recipe.rate for recipe in RECIPES.values())]
    figure, axes = plt.subplots(len(shown), 4, figsize=(11.5, 2.7 * len(shown) + 1.0), squeeze=False, sharex="col")
    for line, (teacher, digest) in zip(axes, shown, strict=True):
        of_teacher = {way: select(rows, way=way, teacher=teacher, digest=digest)[-1:] for way in ("teacher", "removed")}
        for start, key in ((0, "error"), (2, "score")):
            pair = line[start : start + 2]
            pair[1].sharey(pair[0])
            pair[1].tick_params(labelleft=False)
            for axis, unit in zip(pair, units, strict=True):
                for name, recipe in RECIPES.items():
                    if recipe.rate == unit:
                        found = tried(rows, teacher, digest, name, steps)
                        _curve(axis, found, key, COLORS[LOSSES[name]])
                for row in of_teacher["removed"]:
                    axis.axhline(float(row[key]), color=COLORS["removed"], linestyle="--", linewidth=1.2)
                for row in of_teacher["teacher"] if key == "score" else []:
                    axis.axhline(float(row[key]), color=plots.INK, linestyle=":", linewidth=1.2)
                axis.set_xscale("log")
                values = next(recipe.rates for recipe in RECIPES.values() if recipe.rate == unit)
                axis.set_xticks(values, [f"{value:g}" for value in values], fontsize=8)
                axis.xaxis.set_minor_locator(NullLocator())
            if key == "error":
                pair[0].set_yscale("log")
                plain_log(pair[0].yaxis)
            else:
                pair[0].set_ylim(-0.03, 1.03)
            pair[0].set_ylabel("velocity error" if key == "error" else "score")
        line[0].set_title(f"{teacher} ({digest[:8]})", loc="left", color=plots.INK, fontsize=10)
    for axis, unit in zip(axes[-1], [*units, *units], strict=True):
        axis.set_xlabel(f"{'Muon' if unit.endswith('update') else 'AdamW'}: {unit.partition('.')[2]}")
    handles = [
        Line2D(
            [], [], color=COLORS["per token"], marker="o", markersize=4, label="error per token (with Muon: standard)"
        ),
        Line2D([], [], color=COLORS["direction"], marker="o", markersize=4, label="direction (with AdamW: paper)"),
        Line2D(
            [], [], color=plots.INK, marker="o", markersize=9, markerfacecolor="none", linewidth=0, label="best rate"
        ),
        Line2D([], [], color=COLORS["removed"], linestyle="--", label="blocks removed"),
        Line2D([], [], color=plots.INK, linestyle=":", label="teacher"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    plots.save_figure(figure, path)
    return True


def plain_log(side: Any) -> None:
    """Label a logarithmic axis, on which everything is drawn, with plain numbers, as many as have room."""
    low, high = side.get_view_interval()
    decades = math.log10(high / low)
    subs = {0.6: (1, 1.5, 2, 3, 5, 7), 1.6: (1, 2, 5), 2.6: (1, 3), math.inf: (1,)}
    side.set_major_locator(LogLocator(subs=next(found for most, found in subs.items() if decades < most)))
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    side.set_minor_locator(NullLocator())


def _curve(axis: Any, rows: Sequence[Row], key: str, color: str) -> None:
    """Draw one recipe's values by rate, and a ring around the rate with the least error. Diverged ones are left out."""
    drawn = [row for row in rows if row[key] and math.isfinite(float(row[key]))]
    if drawn:
        axis.plot(
            [float(row["rate"]) for row in drawn], [float(row[key]) for row in drawn], "o-", color=color, markersize=4
        )
        top = best(drawn)
        axis.plot(float(top["rate"]), float(top[key]), "o", color=color, markersize=9, markerfacecolor="none")


def plot_subsets(path: Path, rows: Sequence[Row], subsets: Sequence[Row], steps: int) -> bool:
    """Plot each subset's error against that of the paper's recipe as configured, a panel for each teacher."""
    shown = {pair: subset_errors(rows, subsets, *pair, steps) for pair in teachers_of(subsets)}
    shown = {pair: errors for pair, errors in shown.items() if "the paper's" in errors}
    if not shown:
        return False
    figure, axes = plt.subplots(1, len(shown), figsize=(1.2 + 4.0 * len(shown), 4.4), squeeze=False)
    styles = {
        "removed": (COLORS["removed"], "x"),
        "the paper's at its best rate": (COLORS["direction"], "s"),
        "ours": (COLORS["per token"], "o"),
    }
    for axis, ((teacher, digest), errors) in zip(axes.flat, shown.items(), strict=True):
        papers = errors["the paper's"]
        for label, (color, marker) in styles.items():
            found = errors.get(label, {})
            both = [(papers[n], found[n]) for n in found if n in papers]
            axis.plot(*zip(*both, strict=True), marker, color=color, label=label, markersize=4.5) if both else None
        ends = min(papers.values()), max(papers.values())
        for factor, text in ((1.0, "equal"), (0.5, "half")):
            axis.plot(
                ends,
                [factor * end for end in ends],
                color=plots.INK,
                linewidth=1,
                linestyle="-" if factor == 1 else ":",
            )
            place = ends[1], factor * ends[1]
            axis.annotate(text, place, xytext=(5, 0), textcoords="offset points", va="center", color=plots.INK)
        axis.margins(x=0.12)
        axis.set(xscale="log", yscale="log", xlabel="velocity error with the paper's students")
        for side in (axis.xaxis, axis.yaxis):
            plain_log(side)
        axis.set_title(f"{teacher} ({digest[:8]})", loc="left", color=plots.INK, fontsize=10)
    axes[0][0].set_ylabel("velocity error of the same subset")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    plots.save_figure(figure, path)
    return True


def plot_equal(path: Path, rows: Sequence[Row], chains: Sequence[Row], budgets: Mapping[str, float]) -> bool:
    """Plot score and peak memory of the group `equal`, a line for each entry, the highest score on top.

    A teacher and a budget that have been measured are a row of panels.
    """
    measured = [
        (teacher, digest, budget, found)
        for teacher, digest in teachers_of(select(chains, group="equal"))
        for budget, limit in budgets.items()
        if (found := scored(entries(chains, teacher, digest, limit)))
    ]
    if not measured:
        return False
    heights = [len(found) for *_, found in measured]
    size = (9.5, 1.4 + 0.34 * sum(heights) + 0.7 * len(heights))
    figure, axes = plt.subplots(
        len(measured), 2, figsize=size, squeeze=False, sharey="row", sharex="col", height_ratios=heights
    )
    for (left, right), (teacher, digest, budget, found) in zip(axes, measured, strict=True):
        names = sorted(found, key=lambda name: average(found[name], "score") or 0.0)
        for axis, key in ((left, "score"), (right, "peak_mb")):
            for height, name in enumerate(names):
                color = COLORS["per token" if EQUAL[name].is_ours else "direction"]
                mean, margin = mean_and_spread(float(row[key]) for row in found[name])
                axis.errorbar(mean, height, xerr=margin or None, fmt="o", color=color, capsize=3)
        left.set_yticks(range(len(names)), [EQUAL[name].label for name in names])
        left.set_ylim(-0.6, len(names) - 0.4)
        for way, color, style in (("teacher", plots.INK, ":"), ("removed", COLORS["removed"], "--")):
            for row in select(rows, way=way, teacher=teacher, digest=digest)[-1:]:
                left.axvline(float(row["score"]), color=color, linestyle=style, linewidth=1.2)
        left.set(xlim=(0, 1))
        right.set(xscale="log")
        plain_log(right.xaxis)
        title = f"{teacher} ({digest[:8]}), {budgets[budget]:g} minutes of training"
        left.set_title(title, loc="left", color=plots.INK, fontsize=10)
    axes[-1][0].set_xlabel("score")
    axes[-1][1].set_xlabel("peak of live tensors, MB")
    handles = [
        Line2D([], [], color=COLORS["per token"], marker="o", linewidth=0, label="local training by our recipe"),
        Line2D([], [], color=COLORS["direction"], marker="o", linewidth=0, label="all others"),
        Line2D([], [], color=COLORS["removed"], linestyle="--", label="blocks removed"),
        Line2D([], [], color=plots.INK, linestyle=":", label="teacher"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    plots.save_figure(figure, path)
    return True


def scored(found: ByEntry) -> ByEntry:
    """Return the entries that have a score and a peak in all of their rows."""
    return {
        name: rows for name, rows in found.items() if None not in (average(rows, "score"), average(rows, "peak_mb"))
    }
