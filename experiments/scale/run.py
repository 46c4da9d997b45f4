"""`make bench`: ours against the plain way, in one run on one machine, to runs/bench/bench.json."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from common import write_csv  # noqa: E402
from scale import detection, memory, replay, steps, streaming  # noqa: E402

from ppcl.artifacts.files import read_json, write_json  # noqa: E402

OUTPUT = Path("runs/bench/bench.json")
# By what `--only` calls it: a function of `tiny` that returns figures by name.
FIGURES: dict[str, Callable[[bool], dict[str, Any]]] = {
    "step": steps.figures,
    "boundaries": replay.figures,
    "detect": detection.figures,
    "memory": memory.figures,
    "stream": streaming.figures,
}


def machine() -> dict[str, Any]:
    """What the figures hold for. `load` is other work as it began: figures of a busy machine are none."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": models[0].partition(": ")[2] if models else platform.processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "lightning", "diffusers")},
    }


def as_rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The ratios, with what each is one of."""
    rows = []
    for name, figure in content.items():
        if "ratio" in figure:
            (first, one), (second, other) = figure["of"].items()
            spread = {key: figure.get(key, "") for key in ("lowest", "highest")}
            compared = {"of": first, "value": one, "and": second, "other_value": other, "unit": figure["unit"]}
            rows.append({"figure": name, "ratio": figure["ratio"]} | spread | compared)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), help="the others stay as they are")
    parser.add_argument("--tiny", action="store_true", help="whether it runs; its figures mean nothing")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # hardware notes and tips
    partial = chosen.only != list(FIGURES) and chosen.output.exists()
    content = read_json(chosen.output, "The bench") if partial else {}
    for name in chosen.only:
        start = time.perf_counter()
        facts = machine() | {"tiny": chosen.tiny}
        found = FIGURES[name](chosen.tiny)
        content |= found
        content["machine"] = content.get("machine", {}) | {name: facts | {"seconds": time.perf_counter() - start}}
        write_json(chosen.output, content)
        for row in as_rows(found):
            spread = f" ({row['lowest']:.2f} to {row['highest']:.2f})" if row["lowest"] else ""
            of = f"{row['of']} {row['value']:.3g}, {row['and']} {row['other_value']:.3g} {row['unit']}"
            print(f"{row['figure']:32} {row['ratio']:.2f}{spread}: {of}", flush=True)
    write_csv(chosen.output.with_suffix(".csv"), as_rows(content))
    print(f"wrote {chosen.output}")


if __name__ == "__main__":
    main()
