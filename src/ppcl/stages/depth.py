"""Stage 1.3: train one student block per interval on the teacher's activations (paper Eq. 6-7).

With `distill.from_boundaries` the activations come from disk, and the teacher is not loaded.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.headers import Header, fingerprint
from ppcl.artifacts.plan import Interval, Intervals, plug_name
from ppcl.artifacts.plugs import Plug, check_losses, is_stored
from ppcl.context import Run
from ppcl.data.batches import StepLoader
from ppcl.data.boundaries import HELD_OUT, TRAIN, BoundaryStream
from ppcl.distill.boundaries import (
    boundaries_identity,
    held_out_steps,
    initial_students,
    num_stored,
    stored_boundaries,
)
from ppcl.distill.depth import DepthDistillation, DepthFromBoundaries
from ppcl.distill.groups import divided, select_intervals
from ppcl.memory.plan import Plan
from ppcl.options import identity
from ppcl.parallel import barrier
from ppcl.progress import Part
from ppcl.report.text import counted, show_risen
from ppcl.training.cost import total_cost
from ppcl.training.drawing import Drawn
from ppcl.training.loop import check_resumable, discard_checkpoint, fit
from ppcl.training.sharding import place, ready, whole_state
from ppcl.validation.pruning import resolve_intervals
from ppcl.variants.reach import check_reachable


def plug_header(run: Run, stack: str, pair: Interval) -> Header:
    """Return the header of the student of interval `pair`, which lists everything that its weights depend on.

    With `distill.mode=parallel` that does not include the other intervals; a sequential student depends on all of them.
    """
    settings = identity(run.config.distill)
    if run.config.distill.from_boundaries:
        _, record = stored_boundaries(run)
        made_from = {
            "model": record["made_from"]["model"],
            "stack": stack,
            "interval": list(pair),
            "distill": settings,
            "precision": run.precision,
            "boundaries": boundaries_identity(run),
            "stored": num_stored(run),
        }
        return Header("ppcl.plug", made_from)
    made_from = {
        "model": run.teacher.identity,
        "stack": stack,
        "interval": list(pair),
        "distill": settings,
        "precision": run.precision,
        "data": run.data.identity,
    }
    if run.config.distill.mode == "sequential":
        made_from["chain"] = {s: [list(p) for p in pairs] for s, pairs in run.intervals.items()}
    return Header("ppcl.plug", made_from)


def _names(intervals: Intervals) -> list[str]:
    return [plug_name(stack, pair) for stack, pairs in intervals.items() for pair in pairs]


def _checkpoint_folder(run: Run, intervals: Intervals) -> Path:
    """Return the checkpoint folder of a training of exactly these intervals.

    Jobs that train other intervals in the same run therefore have checkpoints of their own.
    """
    return run.plugs_folder / f"checkpoint-{fingerprint({'intervals': _names(intervals)})}"


def _checkpoint_of(run: Run, intervals: Intervals) -> tuple[Path, Header]:
    """Return that folder, and the header of its training."""
    header = Header("ppcl.depth", plug_header(run, "", (0, 0)).made_from | {"intervals": _names(intervals)})
    return _checkpoint_folder(run, intervals), header


def _from_teacher(run: Run, intervals: Intervals) -> tuple[DepthDistillation, Any, Any, list[nn.Module]]:
    """Return module, training batches, held-out batches and blocks of a training with the teacher in memory.

    Batches are functions of the step, which return a list of those that `distill.accumulate` divides it into. The
    blocks are the teacher's, which `trainer.compile` compiles.
    """
    config, transformer = run.config.distill, run.teacher.transformer
    module = DepthDistillation(run.family, transformer, intervals, config, run.precision, ready(run))
    stream = run.data.shared_stream(run.config.data.train_seed, config.batch_size)
    run.say_once("depth", stream.remark)
    heldout = run.data.shared_stream(run.config.data.calibration_seed, config.batch_size)
    train, measured = (partial(each.divided, parts=config.accumulate) for each in (stream, heldout))
    return module, train, measured, list(run.family.blocks(transformer).values())


def _from_boundaries(run: Run, intervals: Intervals) -> tuple[DepthDistillation, Any, Any, list[nn.Module]]:
    """Return the same for a training from stored activations. It has no teacher, so the list of blocks is empty."""
    folder, record = stored_boundaries(run)
    students = initial_students(run, intervals, folder, record["fingerprint"])
    module = DepthFromBoundaries(run.family, intervals, students, run.config.distill, run.precision)
    folders = [folder / plug_name(stack, pair) for stack, pair in module.pairs]
    stream = BoundaryStream(folders, TRAIN, num_stored(run), record["fingerprint"])
    heldout = BoundaryStream(folders, HELD_OUT, len(held_out_steps(run)), record["fingerprint"])
    return module, lambda step: [stream(step)], lambda step: [heldout(step)], []


def _advice(run: Run) -> str:
    """Return the remedy for students in this run that were trained with other settings, for an error message."""
    other = "name=OTHER"
    if resolve_intervals(run.config) is None and "detect" not in run.config.stages:
        other += f" intervals=from_plan intervals.path={run.plan_path}"
    if run.config.paths.base_run is not None:
        other += " and without paths.base_run="
    return f"train others with {other}, or delete {run.plugs_folder} to train them anew"


def run(run: Run) -> None:
    """Train the students that do not exist yet, in `distill.groups` trainings, and write each of them to `plugs/`.

    With each student its held-out loss before and after the training is stored. A killed training resumes from its last
    checkpoint. Raises `UsageError` if the budget cannot be reached with these intervals, or if the run has students or
    checkpoints of other settings.
    """
    check_reachable(run, run.intervals)
    every = select_intervals(run.intervals, run.config.distill.intervals)
    groups = _groups(run, every)
    for number, chosen in enumerate(groups, start=1):
        if len(groups) > 1:
            run.part = Part(number, len(groups), "groups")
            run.say("depth", f"group {number} of {len(groups)}: {', '.join(_names(chosen))}")
        if _train(run, chosen) and run.writes and len(groups) > 1:
            shutil.copy(_cost_path(run), _cost_path(run, chosen))
    run.part = None
    if run.writes and len(groups) > 1:
        # Those of earlier commands count, too.
        found = [path for chosen in groups if (path := _cost_path(run, chosen)).exists()]
        if found:  # students may also have been trained without groups, or imported
            write_json(_cost_path(run), total_cost([read_json(path, "The cost of a training") for path in found]))
    for folder in _begun(run, every).values():
        discard_checkpoint(run, folder)  # of another division, whose students are all trained by now


def _begun(run: Run, every: Intervals) -> dict[int, Path]:
    """Return the checkpoint folder of each division into groups that a stopped training has begun, by their number."""
    found: dict[int, Path] = {}
    for number in range(1, 1 + sum(map(len, every.values()))):
        for group in divided(every, number):
            folder = _checkpoint_folder(run, group)
            if folder.is_dir() and folder not in found.values():
                found[number] = folder
    return found


def _groups(run: Run, every: Intervals) -> list[Intervals]:
    """Return `every` interval, divided into the groups that are trained one after another.

    `auto` goes on with the division that a stopped training has begun, if that fits on this device.
    """
    number, begun = Plan(run).groups(), _begun(run, every)
    fitting = [other for other in begun if other >= number]  # more groups need less memory
    if run.config.distill.groups == "auto" and fitting:
        number = fitting[0]
    used = divided(every, number)
    for other, folder in begun.items():
        if divided(every, other) != used:
            run.say("depth", f"{folder} is not used: distill.groups={other} goes on with it, this trains anew")
    barrier()  # all ranks must have looked before one changes these folders
    return used


def _cost_path(run: Run, group: Intervals | None = None) -> Path:
    """Return the file with the cost of the training, or of that of one group of intervals."""
    if group is None:
        return run.folder / "training" / "depth.json"
    return run.plugs_folder / f"cost-{_checkpoint_folder(run, group).name}.json"


def _train(run: Run, chosen: Intervals) -> bool:
    """Train those students of `chosen` together that do not exist yet, and return whether there were any."""
    config, folder = run.config.distill, run.plugs_folder
    missing: Intervals = {}
    for stack, pairs in chosen.items():
        for pair in pairs:
            record = folder / f"{plug_name(stack, pair)}.json"
            if not is_stored(record, plug_header(run, stack, pair), _advice(run)):
                missing.setdefault(stack, []).append(pair)
    if not missing:
        discard_checkpoint(run, _checkpoint_folder(run, chosen))
        run.say("depth", f"reused {folder}")
        return False
    checkpoints, header = _checkpoint_of(run, chosen)
    if config.mode == "sequential" or check_resumable(checkpoints, header, sharded=run.teacher.sharded):
        missing = chosen  # a chain trains as one; resume if killed while writing plugs
    else:
        checkpoints, header = _checkpoint_of(run, missing)
        check_resumable(checkpoints, header, sharded=run.teacher.sharded)
    module, stream, heldout, blocks = (_from_boundaries if config.from_boundaries else _from_teacher)(run, missing)

    def measure(description: str) -> list[dict[str, float]]:
        """Return the losses of each interval's student on the held-out batches, by name."""
        steps = run.track(held_out_steps(run), description)
        place(run, module)
        return module.heldout(run.data.to_device(batch) for step in steps for batch in heldout(step))

    before = measure("before distillation")
    for (stack, pair), found in zip(module.pairs, before, strict=True):
        check_losses(plug_name(stack, pair), found)  # before the training, whose rate would be blamed
    loader = StepLoader(stream, config.steps, ahead=config.from_boundaries or run.data.from_disk)
    blocks = [*blocks, *module.parts.values()]

    def watched(count: int) -> dict[str, float]:
        steps = held_out_steps(run)[:count]
        found = module.heldout(run.data.to_device(batch) for step in steps for batch in heldout(step))
        return {name: losses["loss"] for name, losses in zip(module.names, found, strict=True)}

    drawn = None if config.from_boundaries else Drawn(module.names, run.teacher.transformer, module.plugged)
    fit(run, "depth", module, loader, checkpoints, header, config, blocks, watched, drawn)
    after = measure("after distillation")
    each_losses = {}
    for number, (stack, pair) in enumerate(module.pairs):
        each_losses[stack, pair] = losses = {
            "train": module.average_losses[number].item(),
            "heldout_before": before[number]["loss"],
            **{f"heldout_{key}": value for key, value in after[number].items()},
        }
        check_losses(plug_name(stack, pair), losses)  # of all, before the first is written
    for (stack, pair), losses in each_losses.items():
        state = whole_state(module.student(stack, pair), run.teacher.dtype_of)
        plug = Plug(plug_header(run, stack, pair), stack, state, losses, pair)
        if run.writes:
            plug.save(folder)
        run.say(
            "depth",
            f"{plug.name}: held-out loss {losses['heldout_before']:.4f} -> {losses['heldout_loss']:.4f}",
        )
    trained = {plug_name(*key): losses for key, losses in each_losses.items()}
    show_risen(run, "depth", trained, next(iter(module.rates())), "name the other intervals in intervals.names")
    for finished in (checkpoints, _checkpoint_folder(run, chosen)):
        discard_checkpoint(run, finished)
    run.say("depth", f"wrote {counted(len(module.pairs), 'plug')} to {folder}")
    return True
