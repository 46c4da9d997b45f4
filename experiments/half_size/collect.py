"""Gathers the runs of the sweep into results.csv and prints the mean drop."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from common import collect, read_rows  # noqa: E402

if __name__ == "__main__":
    collect(HERE / "results.csv", read_rows("half_size", {name: name for name in ("ppcl-planned", "ppcl-finetuned")}))
