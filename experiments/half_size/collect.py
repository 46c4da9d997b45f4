"""Gathers the runs of the sweep into results.csv and prints the mean drop."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from common import mean_and_spread, write_csv  # noqa: E402


def main() -> None:
    rows = []
    for config in sorted(Path("runs/half_size").glob("*/config.yaml")):
        settings = yaml.safe_load(config.read_text())
        scores = {path.stem: json.loads(path.read_text()) for path in (config.parent / "scores").glob("*.json")}
        teacher = scores["teacher"]
        for name in ("ppcl-planned", "ppcl-finetuned"):
            row = scores[name]
            drop = 100 * (1 - row["scores"]["overall"] / teacher["scores"]["overall"])
            facts = {"variant": name, "seed": settings["data"]["train_seed"], "num_layers": row["num_layers"]}
            ratios = {"params_ratio": row["params"] / teacher["params"]}
            ratios |= {"latency_ratio": row["latency_ms"] / teacher["latency_ms"]}
            rows.append(facts | ratios | row["scores"] | {"drop_percent": drop})
    write_csv(HERE / "results.csv", rows)
    for name in ("ppcl-planned", "ppcl-finetuned"):
        mean, spread = mean_and_spread(row["drop_percent"] for row in rows if row["variant"] == name)
        print(f"{name}: drop {mean:.1f} +- {spread:.1f} percent over {len(rows) // 2} seeds")


if __name__ == "__main__":
    main()
