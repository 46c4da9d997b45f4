"""Compare what detection measures on recordings of a traced teacher with what it measures on the known family's data.

    python -m experiments.traced_teachers.similarity --minutes 55

Intervals are chosen by a threshold, so one that is near it comes and goes with the seed. This compares the similarities
themselves. Every detection is a row of similarities.csv beside this file; those that the table has are not made again.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from datetime import date
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch

from experiments.common import SEEDS, make_run
from experiments.recipes.cells import commit
from experiments.recipes.report import fill, table
from experiments.recipes.table import Row, Table, select
from experiments.traced_teachers.run import KNOWN, MODELS, TRACED, detect, differences, intervals_of, overrides
from ppcl.artifacts.files import read_json

HERE = Path(__file__).parent
KEYS = ("teacher", "way", "seed", "samples")
COLUMNS = (*KEYS, "detected", "similarities", "date", "commit")
SAMPLES = (16, 32)  # of calibration; the first is the default, the second all that are kept from training
LONGEST = 4  # blocks of the intervals that are compared
STREAMS = {"encoder_hidden_states": "text", "hidden_states": "image"}  # a traced model's, as the known families say


def detected(teacher: str, way: str, seed: int, samples: int) -> dict[str, Any]:
    """Detect intervals, and return a row without its keys."""
    base = make_run("traced_teachers", f"model={teacher}", "data=shapes", "trainer=cpu", "trainer.num_threads=1")
    name = f"traced_teachers/similarity-{teacher}-{way}-{seed}-{samples}"
    given = [*overrides(teacher, way, seed, 1, base.folder), f"method.num_samples={samples}"]
    folder = Path(base.config.paths.runs_dir) / name
    plan = detect(name, given, folder)
    curves = read_json(folder / "plan" / "curves.json", "The curves", "detect")
    return {
        "detected": intervals_of(plan),
        "similarities": " ".join(f"{number:.2f}" for number in logarithms(curves["cka"])),
        "date": date.today().isoformat(),
        "commit": commit(),
    }


def logarithms(cka: dict[str, dict[str, list[list[float | None]]]]) -> list[float]:
    """Return log(1 - CKA) of every interval of 2 to 4 blocks, for each stack and stream in a fixed order."""
    found = []
    for stack in sorted(cka):
        streams = {STREAMS.get(name, name): values for name, values in cka[stack].items()}
        for _, values in sorted(streams.items()):
            for u, row in enumerate(values):
                for value in row[u + 1 : u + LONGEST]:
                    assert value is not None
                    found.append(math.log(max(1 - value, 1e-6)))
    return found


def distance(one: Row, other: Row) -> float:
    """Return the mean difference between log(1 - CKA) of two detections."""
    pairs = zip(*(map(float, row["similarities"].split()) for row in (one, other)), strict=True)
    apart = [abs(a - b) for a, b in pairs]
    return sum(apart) / len(apart)


def result_table(rows: Sequence[Row]) -> str:
    """Return how far apart detections are: those of the known family, and each traced one from all of these."""
    lines = []
    for teacher, samples in product(MODELS, SAMPLES):
        own = {way: select(rows, teacher=teacher, way=way, samples=samples) for way in (KNOWN, TRACED)}
        both = {
            "two seeds of the known family": [*combinations(own[KNOWN], 2)],
            "traced, and known": [*product(own[TRACED], own[KNOWN])],
        }
        for name, pairs in both.items():
            if pairs:
                apart = [distance(*pair) for pair in pairs]
                blocks = [differences([one], [other])[0] for one, other in pairs]
                shown = [f"{min(apart):.2f} to {max(apart):.2f}", f"{sum(apart) / len(apart):.2f}"]
                shown += [f"{min(blocks)} to {max(blocks)}", f"{sum(blocks) / len(blocks):.1f}"]
                lines.append([f"`{teacher}`", str(samples), name, str(len(pairs)), *shown])
    header = ["teacher", "samples", "what is compared", "pairs"]
    header += ["similarities apart", "mean", "blocks that differ", "mean"]
    return table(header, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--way", nargs="+", choices=(KNOWN, TRACED), default=[KNOWN, TRACED])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--minutes", type=float, default=55.0, help="after which no further detection is begun")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, default=HERE, help="the folder of similarities.csv and of the table")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = Table(given.output / "similarities.csv", COLUMNS, KEYS)
    end = time.monotonic() + 60 * given.minutes
    for keys in () if given.table else product(given.teacher, given.way, given.seeds, SAMPLES):
        if time.monotonic() > end:
            print("time is up: give the command again to go on", flush=True)
            break
        named: dict[str, Any] = dict(zip(KEYS, keys, strict=True))
        if found.find(**named) is None:
            found.add(named | detected(*keys))
    if found.rows:
        fill(given.output / "README.md", {"similarity": result_table(found.rows)})
        print(result_table(found.rows), flush=True)


if __name__ == "__main__":
    main()
