"""Measure the peak memory of probes and of a depth step, above the teacher's weights, by the number of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.common import make_run
from experiments.scale.measure import step_memory_mb, weight_bytes
from experiments.scale.models import STACK, Size, make_batch, make_teacher
from experiments.scale.steps import WAYS, make_module
from ppcl.efficiency import LiveBytes
from ppcl.families.registry import get_family
from ppcl.methods.probes import fit_probes

BLOCKS = (20, 40, 60)


def by_blocks(counts: Sequence[int] = BLOCKS, **size: Any) -> list[dict[str, float]]:
    """Return a row per number of blocks, in MB (1e6 bytes), for the intervals [0, 1], [3, 4], [6, 7], ..

    - `depth` and `published`: activations and temporaries of a step, of ours and of the published loop's.
    - `depth_with_students`: the same for ours, with the students' weights, gradients and optimiser states.
    - `depth_one_interval`: the same for a job that only trains the last interval.
    """
    rows = []
    for count in counts:
        chosen = Size(num_layers=count, **({"heads": 1, "side": 8, "text": 16} | size))
        family, teacher, batch = get_family("qwen_image"), make_teacher(chosen), make_batch(chosen)
        with LiveBytes() as recorder:
            for _ in fit_probes(family, teacher, [batch, batch], ridge=1e-6, bias=True):
                pass  # as the stage does, which writes each to its file
        pairs = [(u, u + 1) for u in range(0, count - 1, 3)]

        def step(pairs: list, way: str, teacher: Any = teacher, batch: Any = batch) -> dict[str, float]:
            return step_memory_mb(make_module(WAYS[way], teacher, pairs), batch)

        every, one = step(pairs, "ours"), step(pairs[-1:], "ours")
        rows.append(
            {
                "blocks": count,
                "teacher": weight_bytes(teacher) / 1e6,
                "probe": recorder.peak / 1e6,
                "published": step(pairs, "published")["activations"],
                "depth": every["activations"],
                "depth_with_students": every["with_students"],
                "depth_one_interval": one["with_students"],
            }
        )
    return rows


def of_paper_set() -> dict[str, Any]:
    """Compare the memory of our step and the published one, for the paper's 60 blocks and 13 intervals, but narrow."""
    run = make_run("bench/memory", "model=qwen_image", "intervals=qwen_image_paper")
    size = Size(num_layers=60, heads=2)
    teacher, batch = make_teacher(size), make_batch(size)
    ways = ("published", "ours")
    modules = {name: make_module(WAYS[name], teacher, run.intervals[STACK]) for name in ways}
    of = {name: step_memory_mb(module, batch)["activations"] for name, module in modules.items()}
    return {"ratio": of["ours"] / of["published"], "of": of, "unit": "MB above the teacher's weights, activations"}


def figures(tiny: bool) -> dict[str, Any]:
    """Return this module's figures by name. With `tiny` they only show that the code runs."""
    rows = by_blocks(BLOCKS[:1] if tiny else BLOCKS)
    for row in rows:
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    return {
        "step_memory_ratio_of_paper_set": of_paper_set(),
        "memory_by_blocks": {"unit": "MB above the teacher's weights", "rows": rows},
    }
