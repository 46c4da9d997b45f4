"""Compare one training step of depth distillation with the published one: time, memory and losses."""

from __future__ import annotations

import copy
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch

from experiments.scale.measure import StepTimes, fit, in_turns, speedup, step_memory_mb, weight_bytes
from experiments.scale.models import INTERVALS, STACK, TINY, TINY_INTERVALS, Size, make_batch, make_teacher
from experiments.scale.published import PublishedDistillation
from ppcl.artifacts.plan import Interval
from ppcl.config import DistillConfig
from ppcl.data.batches import TrainingBatch
from ppcl.distill.depth import DepthDistillation
from ppcl.families.registry import get_family
from ppcl.training.loop import compiled

ROUNDS, STEPS = 3, 2  # turns of each way, and timed steps in each turn
UNIT = "seconds a step"
OURS = "ours, no checkpointing"
ONE = "ours, one interval a job"


@dataclass(frozen=True)
class Way:
    """One way to compute a training step, given by settings that a run can have."""

    module: type[DepthDistillation] = DepthDistillation
    gradient_checkpointing: bool = False
    dtype: torch.dtype = torch.float32  # model.dtype, the teacher's; with bfloat16 students train in mixed precision
    compile: bool = False  # trainer.compile


# `step_speedup` compares the published step as it is with OURS. OURS needs no checkpointing: it keeps the graph of one
# interval, which is no larger than the graph that checkpointing rebuilds. `step_speedup_best` uses our fastest way.
WAYS = {
    "published": Way(PublishedDistillation, gradient_checkpointing=True),
    "ours": Way(gradient_checkpointing=True),
    "ours, no checkpointing": Way(),
    "ours, no checkpointing, compiled": Way(compile=True),
    "ours, no checkpointing, bf16": Way(dtype=torch.bfloat16),
    "ours, no checkpointing, bf16, compiled": Way(dtype=torch.bfloat16, compile=True),
    "published, bf16": Way(PublishedDistillation, gradient_checkpointing=True, dtype=torch.bfloat16),
}


def make_module(way: Way, teacher: Any, pairs: list[Interval]) -> Any:
    """Return the Lightning module that trains students of these intervals in this way."""
    settings = DistillConfig(gradient_checkpointing=way.gradient_checkpointing)
    precision = "32-true" if way.dtype == torch.float32 else "bf16-mixed"
    return way.module(get_family("qwen_image"), teacher, {STACK: pairs}, settings, precision)


def losses(module: Any, batch: TrainingBatch) -> list[float]:
    """Return the loss of each interval as a step computes it, without updating any weight."""
    module.manual_backward = lambda loss: loss.backward()  # there is no trainer
    found = [terms["loss"].item() for terms in module.learn(batch)]
    module.zero_grad()
    del module.manual_backward
    return found


def block_passes(pairs: list[Interval]) -> dict[str, int]:
    """Return the number of block forwards in a step; a backward counts as two."""
    teacher, count = pairs[-1][1] + 1, len(pairs)
    return {
        "published": teacher + 4 * count + (count - 1),  # forward, recomputed, backward (2); chain
        "ours": teacher + 4 * count,
        "ours, no checkpointing": teacher + 3 * count,
    }


def figures(tiny: bool) -> dict[str, Any]:
    """Return this module's figures by name. With `tiny` they only show that the code runs."""
    size, pairs = (TINY, TINY_INTERVALS) if tiny else (Size(), INTERVALS)
    dtypes = {way.dtype for way in WAYS.values()}
    teachers, batches = ({dtype: make(size, dtype) for dtype in dtypes} for make in (make_teacher, make_batch))
    teacher, batch = teachers[torch.float32], batches[torch.float32]
    with ExitStack() as stack:
        modules, first_seconds = {}, {}
        for name, way in WAYS.items():
            # Compiled blocks need a model object of their own. It shares the weights.
            own = teachers[way.dtype]
            if way.compile:
                own = copy.deepcopy(own, {id(p): p for p in own.parameters()})
            modules[name] = make_module(way, own, pairs)
            if way.compile:
                blocks = [*getattr(own, STACK), *modules[name].parts.values()]
                stack.enter_context(compiled(blocks))
                start = time.perf_counter()
                fit(modules[name], batches[way.dtype], 1, StepTimes(0))
                first_seconds[name] = time.perf_counter() - start
        fresh = {name: losses(make_module(WAYS[name], teacher, pairs), batch) for name in ("published", "ours")}
        difference = max(abs(a - b) for a, b in zip(fresh["published"], fresh["ours"], strict=True))

        def turn(name: str) -> list[float]:
            times = StepTimes(skip=1)
            fit(modules[name], batches[WAYS[name].dtype], 1 + STEPS, times)
            return times.seconds

        seconds = in_turns({name: lambda name=name: turn(name) for name in WAYS}, 2 if tiny else ROUNDS)
    found = {name: speedup(seconds, "published", name, UNIT) for name in WAYS if name != "published"}
    best = max((name for name in WAYS if name.startswith("ours")), key=lambda name: found[name]["ratio"])
    memory = {
        name: step_memory_mb(make_module(way, teachers[way.dtype], pairs), batches[way.dtype])
        for name, way in WAYS.items()
        if not way.compile
    }
    memory[ONE] = step_memory_mb(make_module(WAYS[OURS], teacher, pairs[-1:]), batch)
    return {
        "step_speedup": found[OURS] | {"largest_difference_of_losses": difference, "losses": fresh["ours"]},
        "step_speedup_with_checkpointing": found["ours"],
        "step_speedup_best": found[best],
        "step_speedup_best_of_bf16": speedup(seconds, "published, bf16", best, UNIT),
        "step_memory_ratio": _memory(memory, "activations"),
        "step_memory_ratio_with_students": _memory(memory, "with_students"),
        "step_memory_ratio_of_one_interval": _memory(memory, "with_students", ONE),
        "step": {
            "size": asdict(size) | {"width": size.width, "tokens": size.tokens},
            "intervals": pairs,
            "block_passes": block_passes(pairs),
            "teacher_mb": weight_bytes(teacher) / 1e6,
            "students_mb": weight_bytes(modules["ours"].parts) / 1e6,
            "speedups": found,
            "seconds": seconds,
            "first_step_seconds_compiled": first_seconds,
            "memory_mb": memory,
        },
    }


def _memory(memory: dict[str, dict[str, float]], kind: str, ours: str = OURS) -> dict[str, Any]:
    """Return our memory over the published loop's. The count is exact, so the ratio has no spread."""
    of = {name: memory[name][kind] for name in ("published", ours)}
    return {"ratio": of[ours] / of["published"], "of": of, "unit": f"MB above the teacher's weights, {kind}"}
