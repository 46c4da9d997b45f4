"""Measure what it costs to watch a training: its time without, with held-out losses, and with pictures too, in turns.

    python -m experiments.scale.watching FOLDER --pairs 3

Students of `tiny_qwen_image` are trained for 250 steps, with the default rhythms: held-out losses of all students are
measured twice after the start, and pictures of four prompts are drawn at the start and at the end. Writes the
figures to `watching.json` beside this file. The share of pictures is what they add to a training with held-out losses.

Trainings in turns differ by several percent on a machine that others use. `inside` is therefore measured within the
watched trainings themselves: the time of the steps by that of the whole training, with what is watched.
With `--inside` only these are run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

import ppcl
from ppcl.artifacts.curves import load_curves
from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.samples import load_samples
from ppcl.stages import depth
from ppcl.training.watching import Watching

HERE = Path(__file__).parent
STEPS = 250


def seconds_of(folder: Path, settings: list[str]) -> tuple[float, float, float]:
    """Train students in a new run, and return the seconds from the first step to the last, measurements included.

    The second number are those of the processor, which other work on the machine disturbs less. The third are the
    seconds that held-out losses and pictures took of the first.
    """
    spent, watched, fit = [], [], depth.fit

    def clocked(method: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            start = time.perf_counter()
            method(*arguments)
            watched.append(time.perf_counter() - start)

        return call

    def timed(*arguments: Any) -> None:
        start, used = time.perf_counter(), time.process_time()
        fit(*arguments)
        spent.append((time.perf_counter() - start, time.process_time() - used, sum(watched)))

    shutil.rmtree(folder / "run", ignore_errors=True)
    clocks = {name: clocked(getattr(Watching, name)) for name in ("_measure", "_draw")}
    with patch.object(depth, "fit", timed), patch.multiple(Watching, **clocks):
        ppcl.run([f"paths.runs_dir={folder}", "name=run", *settings])
    (seconds,) = spent
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where runs are made")
    parser.add_argument("--pairs", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--inside", action="store_true", help="measure the cost within watched trainings alone")
    parser.add_argument("--output", type=Path, default=HERE / "watching.json")
    parser.add_argument("settings", nargs="*", help="further settings of all trainings, such as watch.share=1")
    chosen = parser.parse_args()
    common = ["model=tiny_qwen_image", "stages=[probe,detect,depth]", f"distill.steps={chosen.steps}"]
    common += ["trainer.accelerator=cpu", "trainer.progress=false", "logger=csv"]
    common += chosen.settings
    ways = {
        "off": [*common, "watch.heldout=0", "watch.pictures=0"],
        "losses": [*common, "watch.pictures=0"],
        "pictures": common,
    }
    if chosen.inside:
        ways = {"pictures": common}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for pair in range(chosen.pairs):
        for name in list(ways)[:: 1 if pair % 2 else -1]:
            found[name].append(seconds_of(chosen.folder, ways[name]))
            if name == "pictures":
                (curve,) = load_curves(chosen.folder / "run")["depth"]
                ((_, samples),) = load_samples(chosen.folder / "run")["depth"]
            print(f"{name}: {chosen.steps / found[name][-1][0]:.2f} steps/s", flush=True)
    inside = [1 - watched / seconds for seconds, _, watched in found["pictures"]]
    print(f"inside: {min(inside):.1%} to {max(inside):.1%} of the time goes to the steps")
    if chosen.inside:
        kept = read_json(chosen.output, "The figures") if chosen.output.exists() else {}
        facts = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "shares": inside, "drawn_after": samples.steps}
        kept["inside"] = facts | {"measured_after": curve.steps, "steps": chosen.steps}
        write_json(chosen.output, kept, checked=False)
        return
    wall, processor = ({name: [each[number] for each in values] for name, values in found.items()} for number in (0, 1))
    shares = {
        f"{name}{suffix}": _shares(seconds[more], seconds[less], seconds["off"])
        for suffix, seconds in (("", wall), (", processor", processor))
        for name, more, less in (
            ("losses", "losses", "off"),
            ("pictures", "pictures", "losses"),
            ("both", "pictures", "off"),
        )
    }
    content = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "steps": chosen.steps,
        "measured_after": curve.steps,
        "drawn_after": samples.steps,
        "steps_per_second": {name: [chosen.steps / seconds for seconds in values] for name, values in wall.items()},
        "share": {name: median(values) for name, values in shares.items()},
        "shares": shares,
    }
    write_json(chosen.output, content, checked=False)
    for name, values in shares.items():
        print(f"{name}: add {median(values):.1%} to a training's time ({min(values):.1%} to {max(values):.1%})")


def _shares(longer: list[float], shorter: list[float], whole: list[float]) -> list[float]:
    """Return for each turn by what share of `whole` seconds one training took longer than another."""
    return [(more - less) / of for more, less, of in zip(longer, shorter, whole, strict=True)]


if __name__ == "__main__":
    main()
