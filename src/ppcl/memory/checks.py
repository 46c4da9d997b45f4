"""Tells what the stages of a command need, and refuses a command that needs more than its device has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any, cast

import torch
from rich.table import Table

from ppcl.config import Config
from ppcl.context import Run
from ppcl.disk import in_bytes
from ppcl.errors import UsageError
from ppcl.families.traced.family import Traced
from ppcl.launch import rank, shard_ranks
from ppcl.memory import dry
from ppcl.memory.need import RESERVED, SLACK, Need, capacity, fits
from ppcl.memory.pictures import NO_ROOM, with_pictures
from ppcl.memory.plan import DISK, FLOPS, STAGES, Plan
from ppcl.surgery.count import count_parameters
from ppcl.validation.pruning import budget_of

# What to turn if a stage needs too much, by stage. A key with a value is only named while it has another one.
KEYS: dict[str, tuple[str, ...]] = {
    "cache": ("data.encode_batch_size",),
    "probe": ("probe.num_batches", "probe.batch_size", "model.streaming=true"),
    "detect": ("method.batch_size", "model.streaming=true"),
    "tinyfusion": ("method.settings.batch_size",),  # a method that trains
    "boundaries": ("distill.batch_size", "model.streaming=true"),
    "depth": ("distill.accumulate", "distill.optimizer_states=8bit", "distill.groups=auto", "model.streaming=true"),
    "width": ("distill.accumulate", "distill.optimizer_states=8bit", "width.num_batches", "model.streaming=true"),
    "finetune": ("finetune.lora_rank=16", "finetune.accumulate", "model.streaming=true", "strategy=fsdp"),
    "plan": ("model.streaming=true", "trainer.accelerator=cpu"),
    "quantize": ("quantize.batch_size", "quantize.num_batches", "trainer.accelerator=cpu"),
    "generate": ("generate.batch_size", "generate.offload=model", "generate.offload=group"),
    "evaluate": ("generate.variants (a tuned one has weights of its own)", "trainer.accelerator=cpu"),
}
OF_INTERVALS = {"boundaries", "depth", "width", "plan", "finetune", "export", "quantize", "evaluate"}
LARGE = 1_000_000_000  # parameters; smaller models are not checked, since that takes seconds


def estimated(run: Run) -> list[str]:
    """Return the stages of the command that are estimated. `plan` without a budget only counts."""
    return [s for s in STAGES if s in run.config.stages and (s != "plan" or budget_of(run.config) is not None)]


def needs(run: Run) -> list[Need]:
    """Return what the stages of a command need, for those that run the model."""
    stages = estimated(run)
    if not stages:
        return []
    plan = Plan(run)
    return [with_pictures(run, STAGES[stage](plan)) for stage in stages]


def explain(run: Run) -> None:
    """Print a table of what each stage of the command needs."""
    room = capacity(run)
    table = Table("stage", "on the device", "of that", "writes", "hours", title=f"{run.config.model.name}: estimates")
    found = needs(run)
    for need in found:
        size = in_bytes(need.total) + ("" if fits(need.total, room) else " (too much)") if need.device else ""
        hours = "" if need.hours is None else f"{need.hours:.1f}"
        table.add_row(need.stage, size, _told(need.device), in_bytes(need.disk) if need.disk else "", hours)
    run.console.print(table)
    for need in found:
        if need.note:
            run.say("explain", need.note)
        if told := _told(need.host):
            run.say("explain", f"{need.stage} also holds in host memory: {told}")
        if not fits(need.total, room):
            run.say("explain", f"{need.stage} does not fit: turn {_keys(run, need.stage)}")
    if isinstance(run.family, Traced) and not dry.forward_peak(run, 1):
        run.say(
            "explain",
            "activations are not counted: they follow from calls that 'stages=[cache]' has yet to record, or the model "
            "does not run without data",
        )
    others = [stage for stage in run.config.stages if stage not in estimated(run)]
    if others:
        run.say("explain", f"{', '.join(others)}: not estimated")
    if OF_INTERVALS & {*run.config.stages} and not run.has_intervals:
        run.say("explain", "intervals are not known yet: it is assumed that three of every five blocks become one")
    run.say(
        "explain",
        f"the device has {in_bytes(room)}; needed are also {in_bytes(RESERVED)} for its libraries and "
        f"{SLACK - 1:.0%} for fragmentation. Hours: at {FLOPS:.0e} operations and {in_bytes(DISK)} read a second",
    )


def _told(parts: dict[str, float]) -> str:
    """Return the parts and their sizes, largest first, without those that are small beside the rest."""
    largest = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {in_bytes(size)}" for name, size in largest if size > 0.005 * sum(parts.values()))


def _keys(run: Run, stage: str) -> str:
    """Return the keys to turn if `stage` needs too much, without those that already have the value in `KEYS`."""
    config = run.config
    name = config.method.rule if stage == "detect" and config.method.rule in KEYS else stage
    found = [key for key in KEYS.get(name, ()) if not _in_force(config, key)]
    if config.strategy.kind == "fsdp" and shard_ranks(config.strategy.shard_over) < rank()[1]:
        found.append("strategy.shard_over=all")
    return " or ".join(found) or "to a larger device"


def _in_force(config: Config, setting: str) -> bool:
    """Return whether a setting of `KEYS` has its value already, or cannot have it."""
    key, _, value = setting.partition("=")
    if setting == "strategy=fsdp":
        return config.strategy.kind == "fsdp"
    if key == "finetune.lora_rank":
        return bool(config.finetune.lora_rank) or config.finetune.trains != "all"  # which takes no LoRA
    return bool(value) and str(reduce(getattr, key.split("."), cast(Any, config))).lower() == value


def check_memory(run: Run) -> None:
    """Raise `UsageError` if a stage of the command needs more than the device has. Small models are not checked."""
    if not run.config.trainer.check_memory or not estimated(run) or not _is_large(run):
        return
    room = capacity(run)
    for need in needs(run):
        if not fits(need.total, room):
            raise UsageError(
                f"'stages=[{need.stage}]' needs about {in_bytes(need.total)} on {run.device}, which has "
                f"{in_bytes(room)} ({_told(need.device)}): turn {_keys(run, need.stage)}; "
                "explain=true prints all figures, and trainer.check_memory=false tries it."
            )


def room_for_pictures(run: Run, stage: str) -> bool:
    """Return whether a training has the memory to draw sample pictures. Small models are not checked."""
    return not _is_large(run) or NO_ROOM not in with_pictures(run, STAGES[stage](Plan(run))).note


@contextmanager
def in_memory(run: Run, stage: str) -> Iterator[None]:
    """Turn a lack of memory on the device within the context into a `UsageError` that says what to turn."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|not enough memory", str(error)):
            raise
        raise UsageError(
            f"'stages=[{stage}]' ran out of memory on {run.device}: turn {_keys(run, stage)}; "
            "explain=true prints what each stage needs. Nothing is lost: the same command continues."
        ) from error


def _is_large(run: Run) -> bool:
    return count_parameters(run.family, run.config.model.arch, {})["teacher"] >= LARGE
