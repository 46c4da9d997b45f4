"""Figure 4: let the teacher write text without two or three blocks, adjacent or apart.

    python -m experiments.figure4_text_rendering.run

Writes results.csv and figure4.png beside this file, and the tables into its README.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.common import SEEDS, draw_prompts, make_run, mean_and_spread, read_csv, write_csv
from experiments.figure2_layer_removal.run import STACK, removals
from experiments.recipes.report import fill, table
from ppcl.report import plots

HERE = Path(__file__).parent
MODEL = "tiny_qwen_image_v2"  # the shipped teacher that writes letters
SHOWN = 10  # prompts in the picture
REMOVALS_SHOWN = 2  # of each kind


@contextmanager
def without(transformer: nn.Module, removed: Sequence[int]) -> Iterator[None]:
    """Take blocks out of a transformer within the context."""
    blocks = getattr(transformer, STACK)
    setattr(transformer, STACK, nn.ModuleList(block for index, block in enumerate(blocks) if index not in removed))
    try:
        yield
    finally:
        setattr(transformer, STACK, blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of the blocks that are apart")
    parser.add_argument("--prompts", type=int, default=20, help="texts that every model writes")
    parser.add_argument("--table", action="store_true", help="measure nothing; write the tables again")
    parser.add_argument("--output", type=Path, default=HERE, help="the folder of results.csv and figure4.png")
    given = parser.parse_args()
    if not given.table:
        measure(given.seeds, given.prompts, given.output)
    fill(given.output / "README.md", {"result": result_table(read_csv(given.output / "results.csv"))})


def measure(seeds: Sequence[int], prompts: int, output: Path) -> None:
    """Write a row for every removal, and a picture of some."""
    torch.set_num_threads(1)
    settings = ["model.categories=[text]", "data=shapes", "trainer=cpu", "trainer.num_threads=1", "logger=none"]
    run = make_run("figure4", f"model={MODEL}", *settings, f"generate.batch_size={prompts}")
    transformer = run.teacher.pipeline.transformer
    sheet: dict[str, list[Any]] = {}
    fails: dict[str, list[bool | None]] = {}
    captions: list[str] = []
    written: list[dict[str, Any]] = []
    for seed in seeds:
        drawn = removals(len(getattr(transformer, STACK)), np.random.default_rng(seed))
        # Without block 0 no model draws anything, see Figure 2.
        wanted = [("teacher", 0, []), *(one for one in drawn if one[0] != "1" and 0 not in one[2])]
        for kind, _, removed in wanted:
            if any(row["removed"] == " ".join(map(str, removed)) for row in written):
                continue
            with without(transformer, removed):
                asked, pictures = draw_prompts(run, prompts)
            right = [bool(run.benchmark.fulfils(one, picture)) for one, picture in zip(asked, pictures, strict=True)]
            row: dict[str, Any] = {
                "seed": seed,
                "kind": kind,
                "removed": " ".join(map(str, removed)),
                "read": sum(right) / len(right),
            }
            written.append(row | {"prompts": prompts, "date": date.today().isoformat()})
            write_csv(output / "results.csv", written)
            print(written[-1], flush=True)
            if kind == "teacher":
                captions = [one.fact.text for one in asked[:SHOWN]]
            name = label(row)
            sheet[name], fails[name] = pictures[:SHOWN], [not good for good in right[:SHOWN]]
    sheet = {name: sheet[name] for name in map(label, [written[0], *typical(written)])}
    plots.contact_sheet(output / "figure4.png", sheet, captions, fails)


def label(row: dict[str, Any]) -> str:
    """Return the name of a row's model in the picture."""
    return f"without {row['removed'].replace(' ', ', ')}" if row["removed"] else "teacher"


def typical(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for three blocks adjacent and apart, the removals whose share of texts read is nearest to the mean."""
    found = []
    for kind in ("3 contiguous", "3 apart"):
        own = [row for row in rows if row["kind"] == kind]
        mean = mean_and_spread(float(row["read"]) for row in own)[0]
        found += sorted(own, key=lambda row: abs(float(row["read"]) - mean))[:REMOVALS_SHOWN]
    return found


def result_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a row for each number of blocks removed: the share of texts read, of blocks adjacent and apart."""
    teacher = next(row for row in rows if row["kind"] == "teacher")
    lines = [["none", f"{float(teacher['read']):.2f}", ""]]
    for count, name in ((2, "two"), (3, "three")):
        cells = []
        for kind in ("contiguous", "apart"):
            values = [float(row["read"]) for row in rows if row["kind"] == f"{count} {kind}"]
            mean, spread = mean_and_spread(values)
            cells.append(f"{mean:.2f} ± {spread:.2f} ({len(values)} removals)")
        lines.append([name, *cells])
    return table(["blocks removed", "adjacent", "apart"], lines)


if __name__ == "__main__":
    main()
