"""Lookup of boundaries for depth distillation: their folder, their record, and the initial students.

Boundaries are the teacher's activations at the ends of intervals, written by `stages=[boundaries]`. Students can be
trained from them without the teacher. `ppcl.data.boundaries` has the format.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl.artifacts.files import read_json
from ppcl.artifacts.headers import Header
from ppcl.artifacts.plan import Intervals, plug_name
from ppcl.artifacts.tensors import read_tensors
from ppcl.context import Run
from ppcl.data.batches import batch_numbers
from ppcl.errors import UsageError
from ppcl.taps import stack_of


def boundaries_header(run: Run) -> Header:
    """Return the header that identifies this run's boundaries: teacher, data, batch size, steps, and intervals."""
    distill = run.config.distill
    return Header(
        "ppcl.boundaries",
        {
            "model": run.teacher.identity,
            "arch": run.config.model.arch,
            "data": run.data.identity,
            "batch_size": distill.batch_size,
            "steps": num_stored(run),
            "heldout_steps": len(held_out_steps(run)),
            "init": distill.init,
            "intervals": {stack: [list(pair) for pair in pairs] for stack, pairs in run.intervals.items()},
        },
    )


def num_stored(run: Run) -> int:
    """Return how many batches are stored: `distill.steps / distill.replay`, rounded up.

    Each is trained on `distill.replay` times.
    """
    return -(-run.config.distill.steps // run.config.distill.replay)


def held_out_steps(run: Run) -> range:
    """Return the numbers of the calibration batches that held-out losses are measured on."""
    return batch_numbers(run.config.distill.batch_size, 0, 4)


def boundaries_folder(run: Run) -> Path:
    """Return `distill.boundaries`, or else the folder in the cache that is named by the header's fingerprint."""
    if run.config.distill.boundaries is not None:
        return Path(run.config.distill.boundaries)
    return Path(run.config.paths.cache_dir) / "boundaries" / boundaries_header(run).fingerprint


def read_record(run: Run) -> dict[str, Any]:
    """Return the content of `boundaries.json`, which is written when boundaries are complete.

    Raises `UsageError` if it does not exist, or if the boundaries do not fit this run: other `model.dtype`,
    `distill.batch_size` or `distill.init`, an interval that they lack, or too few steps.
    """
    folder = boundaries_folder(run)
    record = folder / "boundaries.json"
    if not record.exists():
        raise UsageError(f"{folder} holds no boundaries, or not all of them: run 'stages=[boundaries]' first.")
    found = read_json(record, "The record of boundaries")
    made_from = found["made_from"]
    wanted = {stack: [list(pair) for pair in pairs] for stack, pairs in run.intervals.items() if pairs}
    given = {
        "model.dtype": (made_from["model"]["dtype"], run.config.model.dtype),
        "distill.batch_size": (made_from["batch_size"], run.config.distill.batch_size),
        "distill.init": (made_from["init"], run.config.distill.init),
    }
    for key, (written, asked) in given.items():
        if written != asked:
            raise UsageError(f"{folder} was written with {key}={written}, not {asked}: set {key}={written}.")
    for stack, pairs in wanted.items():
        missing = [pair for pair in pairs if pair not in made_from["intervals"].get(stack, [])]
        if missing:
            raise UsageError(f"{folder} has no boundaries of {stack} {missing[0]}: run 'stages=[boundaries]' for it.")
    if made_from["steps"] < num_stored(run):
        raise UsageError(
            f"{folder} holds {made_from['steps']} steps, and distill.steps={run.config.distill.steps} with "
            f"distill.replay={run.config.distill.replay} needs {num_stored(run)}: raise distill.replay, or write "
            "boundaries for more steps."
        )
    return found


def initial_students(run: Run, intervals: Intervals, folder: Path) -> dict[str, nn.Module]:
    """Return the students of `intervals` by plug name, with the initial weights stored in `folder`, all trainable.

    The teacher's weights are not needed: the blocks' structure comes from a model on the meta device.
    """
    with torch.device("meta"):
        teacher = run.family.transformer_class.from_config(run.config.model.arch)
    students = {}
    for stack, pairs in intervals.items():
        for pair in pairs:
            name = plug_name(stack, pair)
            student = copy.deepcopy(stack_of(teacher, stack)[pair[0]])
            state, _ = read_tensors(folder / name / "init.safetensors")
            student.load_state_dict(state, assign=True)
            students[name] = student.requires_grad_(True)
    return students
