"""`make bench`: compare ppcl with plain implementations on this machine; write runs/bench/bench.json and .csv.

Each module of figures is measured in a process of its own, so that no memory is left over for the next one. Such a
process ends when this one ends, even if this one is killed.
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
# The keys are values of `--only`. Each module has a function `figures(tiny)`, which returns figures by name.
FIGURES = {
    "step": "experiments.scale.steps",
    "boundaries": "experiments.scale.replay",
    "detect": "experiments.scale.detection",
    "memory": "experiments.scale.memory",
    "stream": "experiments.scale.streaming",
}
PR_SET_PDEATHSIG = 1
GRACE = 10  # seconds in which a process has to end its own commands and remove its temporary folders


def machine() -> dict[str, Any]:
    """Describe the machine. `load` is the load average at the start: figures from a busy machine mean nothing."""
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
    """Handle a signal: exit with the shell's code for it. SystemExit lets every `with` and `finally` run."""
    raise SystemExit(128 + number)


def measure(name: str, tiny: bool, parent: int, results: Connection) -> None:
    """Run in a process of its own: measure figures, and send the machine, the figures and the seconds to `results`."""
    os.setpgid(0, 0)  # a group with all that it starts: Ctrl-C then reaches only the parent, which reports it once
    signal.signal(signal.SIGTERM, stop)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent ended before prctl could watch it
        return
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # hardware notes and tips
    figures = import_module(FIGURES[name]).figures
    start = time.perf_counter()
    facts = machine() | {"tiny": tiny}
    found = figures(tiny)
    results.send((facts, found, time.perf_counter() - start))


def measured(name: str, tiny: bool) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Run `measure` in a process of its own; return what it sends.

    The process has ended when this function returns or is interrupted.
    """
    context = multiprocessing.get_context("spawn")  # a fork would start with this process's memory
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, tiny, os.getpid(), sender))
    process.start()
    sender.close()  # so that the pipe is closed when the process ends
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
        write_json(chosen.output, content, checked=False)
        for row in as_rows(found):
            spread = f" ({row['lowest']:.2f} to {row['highest']:.2f})" if row["lowest"] else ""
            of = f"{row['of']} {row['value']:.3g}, {row['and']} {row['other_value']:.3g} {row['unit']}"
            print(f"{row['figure']:32} {row['ratio']:.2f}{spread}: {of}", flush=True)
    write_csv(chosen.output.with_suffix(".csv"), as_rows(content))
    print(f"wrote {chosen.output}")


if __name__ == "__main__":
    main()
