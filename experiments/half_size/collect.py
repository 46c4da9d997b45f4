"""Write results.csv from the runs of the sweep, and print the mean loss of score."""

from __future__ import annotations

from pathlib import Path

from experiments.common import collect, read_rows

HERE = Path(__file__).parent

if __name__ == "__main__":
    collect(HERE / "results.csv", read_rows("half_size", {name: name for name in ("ppcl-planned", "ppcl-finetuned")}))
