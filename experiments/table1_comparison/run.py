"""Compare ways to prune, cell by cell, into results.csv beside this file; write tables and plots from it.

    python -m experiments.table1_comparison.run --minutes 55

Cells that the table has are not measured again, so the command can be stopped at any time and given again, and several
can share the work. It begins no further cell after `--minutes`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import torch

from experiments.common import SEEDS
from experiments.recipes.cells import Sitting
from experiments.recipes.table import Table
from experiments.table1_comparison import pictures, report
from experiments.table1_comparison.cells import (
    COLUMNS,
    EVERY_SIZE,
    KEYS,
    ONCE,
    SIZES,
    TEACHERS,
    TRAINED,
    UNTRAINED,
    Cell,
    measured_row,
    once,
    trained,
    within,
)

HERE = Path(__file__).parent
STEPS = 500  # of all trainings of a cell together
TRAINED_TEACHERS = TEACHERS[:2]
RETRAINED = ("tinyfusion", "hierarchical_prune", "flux_lite", "greedy")  # rivals that train each size anew
TIME_OF = "ours"  # whose time the others get where the time is equal


def untrained(teachers: Sequence[str], sizes: Sequence[float], entries: Sequence[str]) -> Iterator[Cell]:
    """Yield the cells of models that only lose blocks."""
    for size in sizes:
        for teacher in teachers:
            for name, entry in UNTRAINED.items():
                if name in entries:
                    yield Cell(name, entry, teacher, size)


def equal_samples(
    teachers: Sequence[str], sizes: Sequence[float], entries: Sequence[str], seeds: Sequence[int], steps: int
) -> Iterator[Cell]:
    """Yield the cells of models that are trained on equally many samples."""
    for size in sizes:
        for seed in seeds:
            for teacher in (teacher for teacher in teachers if teacher in TRAINED_TEACHERS):
                for name in (name for name in TRAINED if name in entries):
                    yield trained(name, teacher, size, seed, steps)


def in_equal_time(sitting: Sitting, cells: Sequence[Cell]) -> Iterator[Cell]:
    """Yield the cells of models that are trained for the time that `TIME_OF` took for its samples.

    `cells`: those of equal samples. What they have not measured yet is left out.
    """
    for cell in cells:
        place = {"teacher": cell.teacher, "size": cell.size, "seed": cell.seed, "equal": cell.equal}
        first, own = (sitting.table.find(entry=name, **place) for name in (TIME_OF, cell.name))
        if cell.name != TIME_OF and first and own and own["training_seconds"]:
            yield within(cell, own, float(first["training_seconds"]))


def every_size(entries: Sequence[str], seed: int, steps: int) -> Iterator[Cell]:
    """Yield the cells of four sizes: from one training of ours, and each of its own training by the rivals."""
    for size in EVERY_SIZE:
        for name in (name for name in ONCE if name in entries):
            yield once(name, TRAINED_TEACHERS[0], size, seed, steps)
    for size in EVERY_SIZE:
        for name in (name for name in RETRAINED if name in entries):
            yield trained(name, TRAINED_TEACHERS[0], size, seed, steps)


def measure(sitting: Sitting, cells: Iterator[Cell], end: float) -> None:
    """Measure cells until `end`, in seconds of `time.monotonic`."""
    for cell in cells:
        if time.monotonic() > end:
            print("time is up: give the command again to go on", flush=True)
            return
        say(measured_row(sitting, cell))


def say(row: Mapping[str, str] | None) -> None:
    """Print a row on one line."""
    if row is not None:
        shown = ("entry", "teacher", "size", "seed", "equal", "params_ratio", "velocity_error", "score", "drop_percent")
        print("  ".join(f"{key} {row[key]}" for key in (*shown, "remark") if row.get(key)), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("untrained", "samples", "time", "sizes")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--teacher", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--size", nargs="+", type=float, choices=SIZES, default=list(SIZES))
    names = tuple(dict.fromkeys([*UNTRAINED, *TRAINED, *ONCE]))
    parser.add_argument("--entry", nargs="+", choices=names, default=list(names))
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--minutes", type=float, default=55.0, help="after which no further cell is begun")
    parser.add_argument("--steps", type=int, default=STEPS, help="of all trainings of a cell together")
    parser.add_argument("--prompts", type=int, default=60, help="per category")
    parser.add_argument("--alone", action="store_true", help="rows say that nothing else ran on the machine")
    parser.add_argument("--plot", action="store_true", help="measure nothing")
    parser.add_argument("--pictures", action="store_true", help="draw pictures of trained models, and measure nothing")
    parser.add_argument("--output", type=Path, default=HERE, help="the folder of results.csv, tables and plots")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sitting = Sitting(Table(given.output / "results.csv", COLUMNS, KEYS), given.prompts, not given.alone)
    end = time.monotonic() + 60 * given.minutes
    if given.pictures:
        for size, teacher in product(given.size, given.teacher):
            cells = list(equal_samples([teacher], [size], given.entry, given.seeds[:1], given.steps))
            name = f"pictures_{teacher.removeprefix('tiny_')}_{100 * size:.0f}.png"
            if pictures.write(given.output / name, cells, given.prompts):
                print(f"wrote {given.output / name}", flush=True)
        return
    if not given.plot:
        if "untrained" in given.only:
            measure(sitting, untrained(given.teacher, given.size, given.entry), end)
        cells = list(equal_samples(given.teacher, given.size, given.entry, given.seeds, given.steps))
        if "samples" in given.only:
            measure(sitting, iter(cells), end)
        if "time" in given.only:
            measure(sitting, in_equal_time(sitting, cells), end)
        if "sizes" in given.only:
            measure(sitting, every_size(given.entry, given.seeds[0], given.steps), end)
    report.write(given.output, sitting.table.rows)


if __name__ == "__main__":
    main()
