"""Boundaries on disk as depth distillation finds them: folder, record, and students in their first state."""

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
    """Header of boundaries: the teacher, the data in its order, and the intervals."""
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
    """Steps on disk; with `distill.replay` each is learned from so many times."""
    return -(-run.config.distill.steps // run.config.distill.replay)


def held_out_steps(run: Run) -> range:
    """The batches of the calibration stream that say how good a student is."""
    return batch_numbers(run.config.distill.batch_size, 0, 4)


def boundaries_folder(run: Run) -> Path:
    if run.config.distill.boundaries is not None:
        return Path(run.config.distill.boundaries)
    return Path(run.config.paths.cache_dir) / "boundaries" / boundaries_header(run).fingerprint


def read_record(run: Run) -> dict[str, Any]:
    """The record of finished boundaries that fit this configuration; `UsageError` where they do not."""
    folder = boundaries_folder(run)
    record = folder / "boundaries.json"
    if not record.exists():
        raise UsageError(
            f"{folder} holds no boundaries that were written to their end: run 'stages=[boundaries]' first."
        )
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
            raise UsageError(f"{folder} was written with {key}={written}, not {asked}: use that.")
    for stack, pairs in wanted.items():
        missing = [pair for pair in pairs if pair not in made_from["intervals"].get(stack, [])]
        if missing:
            raise UsageError(f"{folder} has no boundaries of {stack} {missing[0]}: run 'stages=[boundaries]' for it.")
    if made_from["steps"] < num_stored(run):
        raise UsageError(
            f"{folder} holds {made_from['steps']} steps, and distill.steps={run.config.distill.steps} with "
            f"distill.replay={run.config.distill.replay} takes {num_stored(run)}: raise distill.replay, or write more."
        )
    return found


def initial_students(run: Run, intervals: Intervals, folder: Path) -> dict[str, nn.Module]:
    """The students that boundaries were written for, in their first state; the teacher stays on the meta device."""
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
