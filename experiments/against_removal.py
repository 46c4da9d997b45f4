"""Gathers the runs of against_removal.sh into the experiment's results.csv and prints the means."""

from __future__ import annotations

import sys
from pathlib import Path

from common import collect, read_rows

WAYS = {"removed": "removed", "ppcl-depth": "distilled", "ppcl-finetuned": "distilled and tuned"}

if __name__ == "__main__":
    name = sys.argv[1]
    rows = read_rows(name, WAYS) + read_rows(f"{name}_removed", {"ppcl-finetuned": "removed and tuned"})
    collect(Path(__file__).parent / name / "results.csv", rows)
