"""Write results.csv of `experiments/flux` or `experiments/edit` from the runs of against_removal.sh; print the means.

python -m experiments.against_removal flux
"""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.common import collect, read_rows

WAYS = {"removed": "removed", "ppcl-depth": "distilled", "ppcl-finetuned": "distilled and tuned"}
REMOVED = {"removed_100": "removed and tuned", "removed_400": "removed and tuned for the samples of both"}

if __name__ == "__main__":
    name = sys.argv[1]
    rows = read_rows(name, WAYS)
    for suffix, way in REMOVED.items():
        rows += read_rows(f"{name}_{suffix}", {"ppcl-finetuned": way})
    collect(Path(__file__).parent / name / "results.csv", rows)
