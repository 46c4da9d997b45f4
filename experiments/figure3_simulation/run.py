"""Figure 3: cka(u, k) of the linear surrogate, its differences, and the intervals found, for three calibration sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import ppcl
from experiments.common import SEEDS, write_csv
from ppcl.report import plots

HERE = Path(__file__).parent

STACK = "transformer_blocks"


def main() -> None:
    rows, intervals, tables = [], [], []
    for seed in SEEDS:
        settings = [f"name=figure3/{seed}", f"data.calibration_seed={seed}", "method.min_cka=0.9945", "trainer=cpu"]
        results = ppcl.run([*settings, "stages=[probe,detect]"])
        curves = json.loads((results.folder / "plan" / "curves.json").read_text())
        intervals.append({"seed": seed, "intervals": json.dumps(results.plan.intervals[STACK])})
        for stream in ("image", "text", "mean"):
            table = curves["cka"][STACK][stream]
            if stream == "mean":
                tables.append(table)
            for u, row in enumerate(table):
                for k in range(u, len(row)):
                    drop = row[k - 1] - row[k] if k > u else 0.0
                    rows.append({"seed": seed, "stream": stream, "u": u, "k": k, "cka": row[k], "delta": drop})
    write_csv(HERE / "results.csv", rows)
    write_csv(HERE / "intervals.csv", intervals)
    mean = np.nanmean(np.array(tables, dtype=float), axis=0)
    table = [[None if value != value else float(value) for value in row] for row in mean]
    plots.interval_curves(HERE / "figure3.png", table, [tuple(p) for p in json.loads(intervals[0]["intervals"])])
    for row in intervals:
        print(row["seed"], row["intervals"])


if __name__ == "__main__":
    main()
