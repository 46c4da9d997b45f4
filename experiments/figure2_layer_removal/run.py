"""Figure 2: score the teacher without one, two or three blocks, adjacent or apart, at every position."""

from __future__ import annotations

import statistics
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from experiments.common import SEEDS, make_run, mean_and_spread, read_csv, score_pipeline, write_csv
from ppcl.report import plots
from ppcl.variants.costs import velocity_error

HERE = Path(__file__).parent

PER_CATEGORY = 5  # 90 pictures of each removal over all seeds, and thousands for each curve
STACK = "transformer_blocks"
KINDS = ("1", "2 contiguous", "2 apart", "3 contiguous", "3 apart")


def removals(num_layers: int, rng: np.random.Generator) -> list[tuple[str, int, list[int]]]:
    """Return the kind, position and blocks of each removal.

    `position` is the first adjacent block, or one of the blocks apart. The others of those are drawn at random.
    """
    found = []
    for position in range(num_layers):
        found.append(("1", position, [position]))
        for count in (2, 3):
            if position + count <= num_layers:
                found.append((f"{count} contiguous", position, list(range(position, position + count))))
                while True:
                    others = rng.choice(num_layers, count - 1, replace=False).tolist()
                    blocks = sorted([position, *others])
                    if all(b - a > 1 for a, b in pairwise(blocks)):
                        break
                found.append((f"{count} apart", position, blocks))
    return found


def main() -> None:
    rows = []
    for seed in SEEDS:
        run = make_run(f"figure2/{seed}", "trainer=cpu", f"seed={seed}", "generate.batch_size=60")
        transformer = run.teacher.pipeline.transformer
        blocks = list(getattr(transformer, STACK))
        stream = run.data.stream(seed, 64)
        batches = [stream(step) for step in range(2)]
        with torch.no_grad():
            targets = [transformer(**batch.inputs)[0] for batch in batches]
        teacher = score_pipeline(run, PER_CATEGORY)["overall"]
        for kind, position, removed in removals(len(blocks), np.random.default_rng(seed)):
            kept = [block for index, block in enumerate(blocks) if index not in removed]
            setattr(transformer, STACK, nn.ModuleList(kept))
            error = velocity_error(transformer, batches, targets)
            overall = score_pipeline(run, PER_CATEGORY)["overall"]
            row = {"seed": seed, "kind": kind, "position": position, "removed": " ".join(map(str, removed))}
            rows.append(row | {"velocity_error": error, "overall": overall, "teacher": teacher})
            print(rows[-1], flush=True)
        setattr(transformer, STACK, nn.ModuleList(blocks))
    write_csv(HERE / "results.csv", rows)


def plot() -> None:
    """Plot the mean over the seeds of each kind of removal, by position.

    Removals apart that drew block 0 at random are left out: losing it would hide every other effect.
    """
    rows = read_csv(HERE / "results.csv")
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), sharex=True)
    labels = {"overall": "overall score", "velocity_error": "relative error of the velocity"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for number, kind in enumerate(KINDS):
            found = [row for row in rows if row["kind"] == kind]
            found = [row for row in found if row["position"] == "0" or "0" not in row["removed"].split()]
            by_position: dict[int, list[float]] = {}
            for row in found:
                by_position.setdefault(int(row["position"]), []).append(float(row[key]))
            x = sorted(by_position)
            mean = [mean_and_spread(by_position[position])[0] for position in x]
            style = "--" if "apart" in kind else "-"
            axis.plot(x, mean, style, color=plots.PALETTE[number], label=kind)
            inner = [float(row[key]) for row in found if row["position"] != "0"]
            print(f"{kind:>13} {key}: {statistics.fmean(inner):.4f}, median {statistics.median(inner):.4f}")
        axis.set(xlabel="first block removed", ylabel=label, xticks=range(0, 20, 2))
    axes[0].set_ylim(-0.02, 1)
    axes[1].set_yscale("log")
    handles, kinds = axes[0].get_legend_handles_labels()
    figure.legend(handles, kinds, loc="outside upper center", ncols=len(KINDS), frameon=False, title="blocks removed")
    plots.save_figure(figure, HERE / "figure2.png")


if __name__ == "__main__":
    if sys.argv[1:] != ["--plot"]:
        main()
    plot()
