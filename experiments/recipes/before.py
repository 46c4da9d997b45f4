"""Check that `recipe=paper` trains what the commit before recipes trained, bit for bit.

    git worktree add /tmp/before 1d0d45c
    .venv/bin/python -m experiments.recipes.before /tmp/before .

Both trees train the same students and projectors, one after the other, each in processes of its own on one thread:
with `distill=tiny` on the embedded teachers, and with `distill=paper` on untrained pipelines of the real classes.
Training and held-out losses, headers with fingerprints, and weights have to be equal. It prints a line a training.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

BUILD = """
import sys
from importlib import import_module
from ppcl.families.registry import builders
import_module(builders()[sys.argv[1]]).build_pipeline(0, num_layers=6).save_pretrained(sys.argv[2])
"""
STACK = "transformer_blocks"
WIDTH = ["width.source=given", f"width.{STACK}.ffn=[0]", "width.num_batches=2"]
INTERVALS = {
    "tiny_qwen_image": [f"{STACK}.3-5", f"{STACK}.11-12"],
    "tiny_flux": [f"{STACK}.2-3", "single_transformer_blocks.8-9"],
    "tiny_dit": [f"{STACK}.3-5", f"{STACK}.11-12"],
}
TINY = ["distill=tiny", "distill.steps=20", "width=tiny", "width.steps=20"]
PAPER = ["distill=paper", "distill.steps=6", "distill.warmup_steps=2", "width.steps=6"]
COMMON = ["stages=[depth,width]", "trainer=cpu", "trainer.num_threads=1", "trainer.progress=false", "logger=csv"]


def execute(tree: Path, *arguments: str) -> None:
    """Run Python with these arguments, on the code of `tree`."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tree}: {done.stderr}")


def left(run: Path) -> dict[str, Any]:
    """Return all that a run's trainings left, by name: logged losses, headers and losses of plugs, tensors as bytes."""
    found: dict[str, Any] = {}
    for path in sorted(run.glob("logs/*/version_0/metrics.csv")):
        with path.open(newline="", encoding="utf-8") as handle:
            found[path.parts[-3]] = list(csv.DictReader(handle))
    for path in sorted((run / "plugs").glob("*.json")):
        found[path.name] = json.loads(path.read_text(encoding="utf-8"))
        found[path.name].pop("crc32", None)  # which earlier versions did not write
    for path in sorted((run / "plugs").glob("*.safetensors")):
        found[path.name] = {key: value.tobytes() for key, value in load_file(path).items()}
    return found


def compare(name: str, before: Path, now: Path) -> None:
    """Print what was compared of the two runs; exit with the first difference."""
    expected, found = left(before), left(now)
    differing = [key for key in {*expected, *found} if expected.get(key) != found.get(key)]
    if differing or not expected:
        raise SystemExit(f"{name}: {', '.join(sorted(differing)) or 'everything'} differs.")
    plugs = [content for key, content in expected.items() if key.endswith(".json")]
    tensors = sum(len(content) for key, content in expected.items() if key.endswith(".safetensors"))
    losses = " ".join(f"{plug['losses']['heldout_loss']:.9g}" for plug in plugs)
    print(f"{name}: {len(plugs)} plugs, {tensors} tensors and all losses equal; held-out losses {losses}", flush=True)


def main() -> None:
    """Train with both trees and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a work tree of the commit before recipes, 1d0d45c")
    parser.add_argument("now", type=Path, help="a work tree to compare with it")
    trees = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as place:
        jobs = {f"{model}, distill=tiny": [f"model={model}", *TINY] for model in INTERVALS}
        intervals = {f"{model}, distill=tiny": INTERVALS[model] for model in INTERVALS}
        for model in INTERVALS:
            folder = f"{place}/{model}"
            execute(trees["now"].resolve(), "-c", BUILD, model, folder)
            name = f"untrained {model}, distill=paper"
            jobs[name] = ["model=auto", f"model.path={folder}", *PAPER]
            intervals[name] = [f"{STACK}.1-2", f"{STACK}.3-5"]
        for number, (name, settings) in enumerate(jobs.items()):
            for label, tree in trees.items():
                recipe = ["recipe=paper"] if label == "now" else []
                given = [f"intervals.names=[{','.join(intervals[name])}]", f"paths.runs_dir={place}/{label}"]
                command = [*COMMON, *settings, *WIDTH, *given, *recipe, f"name={number}"]
                execute(tree.resolve(), "-m", "ppcl", *command)
            compare(name, *(Path(place) / label / str(number) for label in trees))


if __name__ == "__main__":
    main()
