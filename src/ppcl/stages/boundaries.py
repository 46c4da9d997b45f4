"""Store the teacher's activations at the ends of intervals, so that students can be trained without the teacher.

For an interval [u, v] these are the inputs of block u and the outputs of block v. One pass of the teacher serves all
intervals and all later trainings, also on other machines (`distill.boundaries=FOLDER`). Where the disk has no room for
all of them, `distill.intervals` names those to store.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ppcl.artifacts.files import sweep, write_json
from ppcl.artifacts.headers import is_current
from ppcl.artifacts.plan import plug_name
from ppcl.artifacts.tensors import write_tensors
from ppcl.context import Run
from ppcl.data.batches import TrainingBatch
from ppcl.data.boundaries import HELD_OUT, STEPS_PER_SHARD, TRAIN, Boundary, BoundaryWriter, whole_shards
from ppcl.disk import check_space, in_bytes
from ppcl.distill.boundaries import asked_for, boundaries_folder, boundaries_header, held_out_steps, num_stored
from ppcl.errors import UsageError
from ppcl.report.text import counted
from ppcl.surgery.depth import student_block
from ppcl.taps import NotedInputs, observe_abreast, stack_of
from ppcl.variants.reach import check_reachable


def run(run: Run) -> None:
    """Store the boundaries of the intervals that `distill.intervals` names, and each student's initial weights.

    Those of held-out and of training steps are stored. If an earlier attempt was killed, this continues after its last
    complete shard. Raises `UsageError` if the budget cannot be reached with these intervals, if the folder holds
    boundaries made with other settings, or if the disk has too little space.
    """
    check_reachable(run, run.intervals)
    intervals, folder, every = asked_for(run), boundaries_folder(run), boundaries_header(run, run.intervals)
    stored = folder.name == every.fingerprint and (folder / "boundaries.json").exists()
    header = every if stored else boundaries_header(run, intervals)
    advice = f"give another folder as distill.boundaries=, or delete {folder} to write it anew"
    pairs = [(stack, pair) for stack in run.family.stacks for pair in intervals.get(stack, [])]
    names = [plug_name(stack, pair) for stack, pair in pairs]
    complete = is_current(folder / "boundaries.json", header, advice)
    wanted = {HELD_OUT: len(held_out_steps(run)), TRAIN: num_stored(run)}
    if complete and all(_is_whole(folder / name, wanted) for name in names):
        run.say("boundaries", f"reused {folder}")
        return
    config = run.config
    kinds = {
        HELD_OUT: (run.data.stream(config.data.calibration_seed, config.distill.batch_size), len(held_out_steps(run))),
        TRAIN: (run.data.stream(config.data.train_seed, config.distill.batch_size), num_stored(run)),
    }
    run.say_once("boundaries", kinds[TRAIN][0].remark)
    _check_shapes(config.distill.batch_size, [stream for stream, _ in kinds.values()])
    transformer = run.teacher.transformer
    for name, (stack, pair) in zip(names, pairs, strict=True):
        student = student_block(list(stack_of(transformer, stack)), pair, run.config.distill.init)
        state = {key: value.detach().cpu().contiguous() for key, value in student.state_dict().items()}
        write_tensors(folder / name / "init.safetensors", state, {"fingerprint": header.fingerprint})
        sweep(folder / name)
    done = {kind: min(whole_shards(folder / name, kind) for name in names) for kind in kinds}
    left = sum(max(0, steps - done[kind] * STEPS_PER_SHARD) for kind, (_, steps) in kinds.items())
    if left:
        _check_space(run, kinds[TRAIN][0], folder, pairs, left)
    for kind, (stream, steps) in kinds.items():
        writers = _writers(folder, kind, header.fingerprint, pairs)
        for writer in writers.values():
            writer.shard = done[kind]
        start = done[kind] * STEPS_PER_SHARD
        shards = range(start, steps, STEPS_PER_SHARD)
        for first in run.track(shards, f"{kind} boundaries"):
            batches = [run.data.to_device(stream(step)) for step in range(first, min(first + STEPS_PER_SHARD, steps))]
            _write_steps(run, batches, writers, pairs)
        for writer in writers.values():
            writer.flush()
    write_json(folder / "boundaries.json", header.to_json())
    files = [file.stat() for file in folder.rglob("*") if file.is_file()]
    size = sum({(file.st_dev, file.st_ino): file.st_size for file in files}.values())  # linked files count once
    run.say(
        "boundaries",
        f"wrote {counted(num_stored(run), 'step')} of {counted(len(names), 'interval')} to {folder} ({in_bytes(size)})",
    )


def _check_shapes(batch_size: int, streams: list[Any]) -> None:
    """Raise `UsageError` if samples of a batch have different shapes: a batch of boundaries has one."""
    if any(len(stream.divided(0, 1)) > 1 for stream in streams):
        raise UsageError(
            f"distill.batch_size={batch_size}: samples of a batch have several shapes, and 'stages=[boundaries]' "
            "stores batches of one: set distill.batch_size=1, or leave boundaries out of stages."
        )


def _is_whole(folder: Path, steps: Mapping[str, int]) -> bool:
    """Return whether an interval's folder has its initial student and all shards of so many `steps` of each kind."""
    return (folder / "init.safetensors").exists() and all(
        whole_shards(folder, kind) * STEPS_PER_SHARD >= count for kind, count in steps.items()
    )


def _writers(folder: Path, kind: str, fingerprint: str, pairs: list[Any]) -> dict[tuple[str, int], BoundaryWriter]:
    """Return the writer of each interval in `pairs`, (stack, (u, v)), by its stack and last block."""
    writers: dict[tuple[str, int], BoundaryWriter] = {}
    for stack, pair in pairs:
        before = writers.get((stack, pair[0] - 1))
        writers[stack, pair[1]] = BoundaryWriter(folder / plug_name(stack, pair), kind, fingerprint, before)
    return writers


def pairs_keys(pairs: list[Any]) -> list[tuple[str, int]]:
    """Return (stack, last block) of each interval in `pairs`, the key of its writer.

    `pairs`: (stack, (u, v)) of each interval.
    """
    return [(stack, pair[1]) for stack, pair in pairs]


@torch.no_grad()
def _write_steps(
    run: Run, batches: list[TrainingBatch], writers: Mapping[Any, BoundaryWriter], pairs: list[Any]
) -> None:
    """Run the teacher on a few batches, up to the end of the last interval, and add the boundaries to each writer."""
    starts = {(stack, pair[0]): (stack, pair[1]) for stack, pair in pairs}
    masks = [run.family.masks(batch.inputs) for batch in batches]
    inputs = [NotedInputs(batch.inputs) for batch in batches]
    waiting: dict[Any, dict[str, Any]] = {}
    ended: dict[Any, Any] = {}  # the outputs of an interval, until the next block has run
    shared: dict[Any, dict[str, str]] = {}
    calls = observe_abreast(
        run.family,
        run.teacher.transformer,
        inputs,
        last=pairs_keys(pairs)[-1],
        size_keys="distill.batch_size",
    )
    for number, call in calls:
        outputs = ended.pop((number, call.stack, call.index - 1), {})
        if call.key in starts:
            key = starts[call.key]
            waiting[number, key] = call.kwargs
            shared[number, key] = {
                name: stream for name, value in call.kwargs.items() for stream, own in outputs.items() if value is own
            }
        if call.key in writers:
            boundary = Boundary(
                waiting.pop((number, call.key)), call.outputs, masks[number], inputs[number].asked_for()
            )
            writers[call.key].add(boundary, batches[number].sigmas, shared.pop((number, call.key)))
            if (call.stack, call.index + 1) in starts:
                ended[number, *call.key] = call.outputs


def _check_space(run: Run, stream: Any, folder: Path, pairs: list[Any], steps: int) -> None:
    """Print an estimate of the disk space that `steps` steps take, from the size of the first step.

    Raises `UsageError` if less is free.
    """
    trial = _writers(folder, TRAIN, "", pairs)
    _write_steps(run, [run.data.to_device(stream(0))], trial, pairs)
    needed = steps * sum(writer.pending_bytes for writer in trial.values())
    remedy = (
        "name a folder with more room as distill.boundaries= or paths.cache_dir=, raise distill.replay, lower "
        "distill.steps, or name a few intervals at a time as distill.intervals="
    )
    run.say("boundaries", check_space(folder, needed, counted(steps, "step"), remedy))
