"""`make bench`: compare ours with plain implementations, in one run on one machine; writes runs/bench/bench.json.

Each figure is measured in a process of its own: what it took of memory goes with it, and nothing of it is left to the
next. That process ends with this one, however this one ends.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import multiprocessing
import os
import platform
import signal
import sys
import time
import warnings
from importlib import import_module
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from experiments.common import write_csv
from ppcl.artifacts.files import read_json, write_json

OUTPUT = Path("runs/bench/bench.json")
# By what `--only` calls it: the module whose `figures`, a function of `tiny`, returns figures by name.
FIGURES = {
    "step": "experiments.scale.steps",
    "boundaries": "experiments.scale.replay",
    "detect": "experiments.scale.detection",
    "memory": "experiments.scale.memory",
    "stream": "experiments.scale.streaming",
}
PR_SET_PDEATHSIG = 1
GRACE = 10  # seconds that a figure has to end its own commands and to remove its temporary folders


def machine() -> dict[str, Any]:
    """Describe the machine. `load` is that of other programs at the start; figures from a busy machine mean nothing."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": models[0].partition(": ")[2] if models else platform.processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "lightning", "diffusers")},
    }


def as_rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each ratio, with the two values that it compares."""
    rows = []
    for name, figure in content.items():
        if "ratio" in figure:
            (first, one), (second, other) = figure["of"].items()
            spread = {key: figure.get(key, "") for key in ("lowest", "highest")}
            compared = {"of": first, "value": one, "and": second, "other_value": other, "unit": figure["unit"]}
            rows.append({"figure": name, "ratio": figure["ratio"]} | spread | compared)
    return rows


def stop(number: int, frame: Any) -> None:
    """Exit with a shell's code for the signal, by an exception, so that every `with` and `finally` is run."""
    raise SystemExit(128 + number)


def measure(name: str, tiny: bool, parent: int, results: Connection) -> None:
    """Send a figure's machine, content and seconds through `results`; runs in a process of its own."""
    os.setpgid(0, 0)  # with all that it starts; Ctrl-C then reaches the parent alone, which says so once
    signal.signal(signal.SIGTERM, stop)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was gone before it could be watched
        return
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # hardware notes and tips
    figures = import_module(FIGURES[name]).figures
    start = time.perf_counter()
    facts = machine() | {"tiny": tiny}
    found = figures(tiny)
    results.send((facts, found, time.perf_counter() - start))


def measured(name: str, tiny: bool) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Return what `measure` sends from a process of its own, which has ended on return and after an interruption."""
    context = multiprocessing.get_context("spawn")  # a fork would begin with all that this process holds
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, tiny, os.getpid(), sender))
    process.start()
    sender.close()  # the end of the process is then the end of the pipe
    try:
        found = receiver.recv()
        process.join(GRACE)
        return found
    except EOFError:
        process.join()
        raise SystemExit(f"{name} was not measured: its process ended with {process.exitcode}") from None
    finally:
        process.terminate()
        process.join(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), help="the others stay as they are")
    parser.add_argument("--tiny", action="store_true", help="whether it runs; its figures mean nothing")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    partial = chosen.only != list(FIGURES) and chosen.output.exists()
    content = read_json(chosen.output, "The bench") if partial else {}
    for name in chosen.only:
        facts, found, seconds = measured(name, chosen.tiny)
        content |= found
        content["machine"] = content.get("machine", {}) | {name: facts | {"seconds": seconds}}
        write_json(chosen.output, content)
        for row in as_rows(found):
            spread = f" ({row['lowest']:.2f} to {row['highest']:.2f})" if row["lowest"] else ""
            of = f"{row['of']} {row['value']:.3g}, {row['and']} {row['other_value']:.3g} {row['unit']}"
            print(f"{row['figure']:32} {row['ratio']:.2f}{spread}: {of}", flush=True)
    write_csv(chosen.output.with_suffix(".csv"), as_rows(content))
    print(f"wrote {chosen.output}")


if __name__ == "__main__":
    main()
