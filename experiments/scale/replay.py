"""Time whole depth trainings: by the published loop, beside the teacher, and from boundaries on disk with replay.

The embedded teacher and its pictures are used, so that the final losses are meaningful. Each way runs the real stages,
timed from the call until the plugs are written. This includes making batches, the teacher's passes, writing and
reading boundaries, and held-out losses before and after.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

from experiments.common import make_run
from experiments.scale.measure import in_turns, speedup
from experiments.scale.models import STACK
from experiments.scale.published import PublishedDistillation
from ppcl.artifacts.files import read_json
from ppcl.artifacts.plugs import load_plugs
from ppcl.stages import depth

ROUNDS = 3
STEPS, BATCH = 160, 32
# As dense as the paper's Qwen-Image set, which has 13 intervals in 58 blocks, and removes two blocks in each.
PAIRS = [(1, 3), (6, 8), (11, 13), (16, 18)]
REPLAYS = (1, 16)
FOLDER = Path("runs/bench/boundaries")


def prepare(way: str, overrides: tuple[str, ...], steps: int) -> Any:
    """Return a run with an empty cache folder, with its teacher loaded."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    given = f"intervals.{STACK}={[list(pair) for pair in PAIRS]}".replace(" ", "")
    sizes = (f"distill.steps={steps}", f"distill.batch_size={BATCH}")
    settings = ("recipe=paper", "distill=tiny", *sizes, "trainer=cpu", given)
    quiet = ("trainer.progress=false", "logger=none", f"paths.cache_dir={FOLDER}/cache")
    run = make_run(f"bench/boundaries/{way}", *settings, *quiet, *overrides)
    run.console.quiet = True
    assert run.teacher.pipeline
    return run


def figures(tiny: bool) -> dict[str, Any]:
    """Return this module's figures by name. With `tiny` they only show that the code runs."""
    steps = 8 if tiny else STEPS
    losses: dict[str, list[float]] = {}
    costs: dict[str, dict[str, float]] = {}

    def way(name: str, stages: tuple[str, ...], *overrides: str) -> Callable[[], list[float]]:
        def train() -> list[float]:
            run = prepare(name, overrides, steps)
            start = time.perf_counter()
            for stage in stages:  # called directly: loading the teacher is not timed
                import_module(f"ppcl.stages.{stage}").run(run)
            seconds = time.perf_counter() - start
            losses.setdefault(name, []).append(
                sum(plug.losses["heldout_loss"] for plug in load_plugs(run.plugs_folder).values())
            )
            cost = read_json(run.folder / "training" / "depth.json", "What the training took")
            stored = sum(file.stat().st_size for file in (FOLDER / "cache" / "boundaries").rglob("*.safetensors"))
            costs[name] = {"peak_mb_of_a_step": cost["peak_memory_mb"], "disk_mb": stored / 1e6}
            return [seconds]

        return train

    online = way("published", ("depth",), "distill.gradient_checkpointing=true")

    def published() -> list[float]:
        with mock.patch.object(depth, "DepthDistillation", PublishedDistillation):  # the same stage, other step
            return online()

    ways = {"published": published, "beside the teacher": way("beside", ("depth",))}
    for replay in REPLAYS:
        settings = ("distill.from_boundaries=true", f"distill.replay={replay}")
        ways[f"replay {replay}"] = way(f"replay-{replay}", ("boundaries", "depth"), *settings)
    seconds = in_turns(ways, 1 if tiny else ROUNDS)
    shutil.rmtree(FOLDER)
    heldout = dict(zip(ways, (statistics.fmean(values) for values in losses.values()), strict=True))
    table = {
        way: {"seconds": statistics.median(seconds[way]), **cost, "heldout_loss": heldout[way]}
        for way, cost in zip(ways, costs.values(), strict=True)
    }
    unit = f"seconds for {steps} steps"

    def figure(slow: str, fast: str) -> dict[str, Any]:
        return speedup(seconds, slow, fast, unit) | {"heldout_loss": {name: heldout[name] for name in (slow, fast)}}

    last = f"replay {REPLAYS[-1]}"
    return {
        "boundary_cache_speedup": figure("published", "replay 1"),
        "boundary_cache_speedup_of_ours": figure("beside the teacher", "replay 1"),
        "replay_speedup": figure("published", last),
        "replay_speedup_of_ours": figure("beside the teacher", last),
        "boundaries": {
            "model": "embedded:tiny_qwen_image",
            "intervals": PAIRS,
            "steps": steps,
            "batch_size": BATCH,
            "seconds": seconds,
            "costs": table,
        },
    }
