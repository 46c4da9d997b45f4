"""Gathers the runs of the sweep into results.csv and prints the mean drop."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from common import collect  # noqa: E402

if __name__ == "__main__":
    collect("half_size", HERE / "results.csv", ["ppcl-planned", "ppcl-finetuned"])
