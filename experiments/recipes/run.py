"""Measure training recipes cell by cell, into results.csv, subsets.csv and chains.csv beside this file; draw plots.

Cells that the tables have are not measured again, so the command can be stopped at any time and given again, and
several can share the work.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import compress
from pathlib import Path

import torch

from experiments.common import SEEDS
from experiments.recipes import chains as chained
from experiments.recipes import report
from experiments.recipes.cells import HERE, KEYS, RECIPES, TEACHERS, Cell, Sitting, claimed, commit, meter
from experiments.recipes.chains import EQUAL, PLANNED, Chains, Equal, Planned
from experiments.recipes.table import Table

COLUMNS = (
    *KEYS,
    *("blocks", "params_ratio", "error", "score", "drop_percent", "seconds", "peak_mb", "minutes", "shared"),
    *("date", "commit", "made_from", "remark", "categories"),
)
SUBSET_KEYS = ("teacher", "digest", "recipe", "rate", "steps", "batch_size", "seed", "subset")
SUBSET_COLUMNS = (*SUBSET_KEYS, "error", "made_from", "date", "commit", "students")
NUM_SUBSETS = 50
DEMO_TEACHER = "tiny_qwen_image"
STEPS = 250
MINUTES = {"short": 5.0, "long": 25.0}
HALF = ("ours", "paper")
ENTRIES = tuple(dict.fromkeys([*EQUAL, *PLANNED]))
# Of the group `planned`: teachers with the demo's intervals, and the share of parameters that all students leave.
PLANNED_TEACHERS = ("tiny_qwen_image", "tiny_qwen_image_v2")
SHARE = 0.655


@dataclass(frozen=True)
class Work:
    """What a command measures: these teachers and seeds, in trainings of `steps` or four times as many."""

    sitting: Sitting
    subsets: Table
    chains: Chains
    teachers: Sequence[str]
    seeds: Sequence[int]
    steps: int
    recipes: Sequence[str] = tuple(RECIPES)
    entries: Sequence[str] = ENTRIES
    lengths: Sequence[str] = tuple(MINUTES)

    @property
    def budgets(self) -> dict[str, tuple[int, float]]:
        """The most steps and minutes of a training, by name."""
        return {"short": (self.steps, MINUTES["short"]), "long": (4 * self.steps, MINUTES["long"])}

    @property
    def wanted(self) -> dict[str, tuple[int, float]]:
        """Those of the budgets that are to be measured."""
        return {name: budget for name, budget in self.budgets.items() if name in self.lengths}

    @property
    def scale(self) -> float:
        """The share of the steps of a real measurement; below 1 it is a try, and minutes shrink as much."""
        return self.steps / STEPS

    @property
    def minutes(self) -> dict[str, float]:
        """The minutes of all trainings of a chain, by budget."""
        return {name: minutes * self.scale for name, minutes in MINUTES.items()}

    def compared(self, teacher: str, steps: int, seed: int) -> list[Cell]:
        """Return the cells of ours, the paper's recipe, and that at its best rate, as soon as `rates` has found it."""
        digest = Cell(teacher, "teacher").run().teacher.identity["weights"]
        found = report.compared(self.sitting.table.rows, teacher, digest, self.steps)
        if len(found) < 3:
            print(f"{teacher}: the paper's recipe at its best rate has to wait for --only rates", flush=True)
        return [Cell(teacher, "local", recipe, float(rate), steps, seed) for recipe, rate in found.values()]


def baselines(work: Work, teacher: str) -> None:
    """Measure the teacher, and the removal of the same blocks without training."""
    for way in ("teacher", "removed"):
        work.sitting.row(Cell(teacher, way))


def rates(work: Work) -> None:
    """Try every recipe at five or six rates, in trainings of equal steps."""
    for teacher in work.teachers:
        baselines(work, teacher)
        for name in work.recipes:
            for rate in RECIPES[name].rates:
                say(work.sitting.row(Cell(teacher, "local", name, rate, work.steps, SEEDS[0])))


def local(work: Work) -> None:
    """Train students within the short and the long budget, with every seed of a teacher."""
    for teacher in work.teachers:
        baselines(work, teacher)
    for steps, minutes in work.wanted.values():
        for teacher in work.teachers:
            for seed in (seed for seed in TEACHERS[teacher].seeds if seed in work.seeds):
                for cell in work.compared(teacher, steps, seed):
                    if cell.recipe in work.recipes:
                        say(work.sitting.row(cell, minutes))


def subsets(work: Work) -> None:
    """Measure random subsets of the students that the short budget of `local` trains, and the same blocks removed."""
    steps, minutes = work.budgets["short"]
    for teacher in work.teachers:
        for cell in [Cell(teacher, "removed"), *work.compared(teacher, steps, SEEDS[0])]:
            row = work.sitting.row(cell, minutes if cell.recipe else None)
            if row is not None and not row["remark"]:
                measure_subsets(work, replace(cell, steps=int(row["steps"])), row)


def half(work: Work) -> None:
    """Prune the demo's teacher to half, by the demo's settings and within the long budget's minutes."""
    for seed in (seed for seed in SEEDS if seed in work.seeds):
        for length in work.wanted:
            minutes = None if length == "short" else work.minutes[length]  # the short one is the demo
            steps = None if minutes is None else 4 * STEPS
            for name in (name for name in HALF if name in work.entries):
                say(work.chains.row(Planned(name, DEMO_TEACHER, seed, minutes, scale=work.scale, steps=steps)))


def planned(work: Work) -> None:
    """Prune by students and projectors to the size that students alone leave."""
    for teacher in (teacher for teacher in PLANNED_TEACHERS if teacher in work.teachers):
        for seed in (seed for seed in TEACHERS[teacher].seeds if seed in work.seeds):
            for length in work.wanted:
                steps = STEPS if length == "short" else 4 * STEPS
                for name in (name for name in PLANNED if name in work.entries):
                    is_tuned = bool(PLANNED[name].tuning)
                    minutes = work.minutes[length] if is_tuned else None
                    rates: list[float | None] = [None]
                    if PLANNED[name].best_rate:
                        rates = [cell.rate for cell in work.compared(teacher, 1, seed)[2:]]
                    for rate in rates:
                        chain = Planned(name, teacher, seed, minutes, rate, work.scale, SHARE, steps, is_tuned)
                        say(work.chains.row(chain))


def equal(work: Work) -> None:
    """Train the same intervals in nine ways for the same time."""
    for teacher in work.teachers:
        baselines(work, teacher)
    for seed in (seed for seed in SEEDS if seed in work.seeds):
        for minutes in (work.minutes[length] for length in work.wanted):
            for teacher in (teacher for teacher in work.teachers if seed in TEACHERS[teacher].seeds):
                for name in (name for name in EQUAL if name in work.entries):
                    if not EQUAL[name].best_rate:
                        say(work.chains.row(Equal(name, teacher, seed, minutes)))
                        continue
                    best = [cell.rate for cell in work.compared(teacher, 1, seed)[2:]]
                    if best:
                        say(work.chains.row(Equal(name, teacher, seed, minutes, best[0])))


def measure_subsets(work: Work, cell: Cell, row: Mapping[str, str]) -> None:
    """Measure the velocity error of `NUM_SUBSETS` subsets for the cell that `row` is of. Each is a row of its own."""
    names = TEACHERS[cell.teacher].intervals
    chosen = random_subsets(len(names), NUM_SUBSETS)
    facts = {key: row[key] for key in (*SUBSET_KEYS, "made_from") if key != "subset"}
    missing = [number for number in range(NUM_SUBSETS) if not work.subsets.find(**facts, subset=number)]
    if not missing:
        return
    run = cell.run()
    with claimed(run.folder) as free:
        if not free:
            return
        switch = cell.switch(run)
        measure = meter(run, switch)
        for number in missing:
            plugged = list(compress(names, chosen[number]))
            switch.board.arrange(**{"students" if cell.recipe else "removed": plugged})
            found = facts | {"subset": number, "error": measure(), "students": " ".join(plugged)}
            work.subsets.add(found | {"date": date.today().isoformat(), "commit": commit()})
        print(f"{run.folder.name}: {len(missing)} subsets", flush=True)


def random_subsets(count: int, number: int, seed: int = 0) -> list[tuple[bool, ...]]:
    """Return `number` different non-empty subsets of `count` things, each drawn by a coin for every thing."""
    assert number < 2**count
    draw = random.Random(seed)
    found: dict[tuple[bool, ...], None] = {}
    while len(found) < number:
        subset = tuple(draw.random() < 0.5 for _ in range(count))
        if any(subset):
            found[subset] = None
    return list(found)


def say(row: Mapping[str, str] | None) -> None:
    """Print a measured row on one line."""
    if row is not None:
        shown = ("group", "entry", "way", "teacher", "recipe", "rate", "steps", "seed", "budget", "error", "score")
        shown += ("seconds", "minutes", "remark")
        print("  ".join(f"{key} {row[key]}" for key in shown if row.get(key)), flush=True)


GROUPS: dict[str, Callable[[Work], None]] = {
    "rates": rates, "local": local, "subsets": subsets, "planned": planned, "half": half,
    "equal": equal,
}  # fmt: skip


def draw(work: Work, folder: Path) -> dict[str, str]:
    """Draw the plots, put the tables into the README of `folder` if it has one, and return them by group."""
    rows = report.select(work.sitting.table.rows, prompts=work.sitting.prompts)
    subset_rows = work.subsets.rows
    chain_rows = report.select(work.chains.table.rows, prompts=work.sitting.prompts)
    tables = {
        "rates": report.rates_table(rows, work.steps),
        "local": report.local_table(rows, work.steps, work.budgets),
        "subsets": report.subsets_table(rows, subset_rows, work.steps),
        "planned": report.planned_table(rows, chain_rows),
        "half": report.half_table(chain_rows),
        "equal": report.equal_tables(rows, chain_rows, work.minutes),
        "costs": report.costs_table(rows),
        **report.neighbours(folder),
    }
    report.fill(folder / "README.md", tables)
    report.plot_rates(folder / "rates.png", rows, work.steps)
    report.plot_subsets(folder / "subsets.png", rows, subset_rows, work.steps)
    report.plot_equal(folder / "equal.png", rows, chain_rows, work.minutes)
    return tables


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--teacher", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES), help="of `rates`, `local`")
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        choices=SEEDS,
        default=list(SEEDS),
        help="of `local`, `planned`, `half` and `equal`",
    )
    parser.add_argument("--entry", nargs="+", choices=ENTRIES, default=ENTRIES, help="of `planned`, `half` and `equal`")
    parser.add_argument(
        "--budget",
        nargs="+",
        choices=MINUTES,
        default=list(MINUTES),
        help="of `local`, `planned`, `half` (short: the demo), `equal`",
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="of a short training; a long one has four times as many"
    )
    parser.add_argument("--prompts", type=int, default=60, help="per category, for the scores")
    parser.add_argument("--alone", action="store_true", help="rows say that nothing else ran on the machine")
    parser.add_argument("--plot", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, default=HERE, help="the folder of the CSV files, plots and README")
    given = parser.parse_args(arguments)
    groups = {"planned": PLANNED, "half": HALF, "equal": EQUAL}
    possible = [name for group, names in groups.items() if group in given.only for name in names]
    if possible and not set(possible) & set(given.entry):
        chosen, only = " ".join(given.entry), " ".join(given.only)
        parser.error(f"argument --entry: {chosen} is not in {only}, which has {', '.join(dict.fromkeys(possible))}")
    torch.set_num_threads(1)
    sitting = Sitting(Table(given.output / "results.csv", COLUMNS, KEYS), given.prompts, not given.alone)
    subset_table = Table(given.output / "subsets.csv", SUBSET_COLUMNS, SUBSET_KEYS)
    chain_table = Table(given.output / "chains.csv", chained.COLUMNS, chained.KEYS)
    chains = Chains(sitting, chain_table, min(chained.TRIAL_STEPS, given.steps))
    settings = given.teacher, given.seeds, given.steps, given.recipe, given.entry, given.budget
    work = Work(sitting, subset_table, chains, *settings)
    for name in GROUPS:
        if name in given.only:
            if not given.plot:
                GROUPS[name](work)
            print(f"\n{draw(work, given.output)[name]}\n", flush=True)


if __name__ == "__main__":
    main()
