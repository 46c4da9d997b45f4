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
from ppcl.distill.groups import select_intervals
from ppcl.errors import UsageError
from ppcl.taps import stack_of


def asked_for(run: Run) -> Intervals:
    """Return the intervals of this run that `distill.intervals` names: all of them if it is None."""
    return select_intervals(run.intervals, run.config.distill.intervals)


def boundaries_header(run: Run, intervals: Intervals) -> Header:
    """Return the header that identifies boundaries of `intervals`: teacher, data, batch size, steps, and intervals."""
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
            "intervals": {stack: [list(pair) for pair in pairs] for stack, pairs in intervals.items()},
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
    """Return `distill.boundaries`, or else a folder in the cache that is named by the header's fingerprint.

    That is the folder of all intervals if it is complete, else that of those which `distill.intervals` names.
    """
    if run.config.distill.boundaries is not None:
        return Path(run.config.distill.boundaries)
    every, own = (
        Path(run.config.paths.cache_dir) / "boundaries" / boundaries_header(run, intervals).fingerprint
        for intervals in (run.intervals, asked_for(run))
    )
    return every if (every / "boundaries.json").exists() else own


def stored_boundaries(run: Run) -> tuple[Path, dict[str, Any]]:
    """Return the folder of complete boundaries that fit this run, and the content of their `boundaries.json`.

    They are those of the intervals that `distill.intervals` names, or of all that the run has. `distill.boundaries` may
    also name the folder above. Raises `UsageError` if no complete boundaries are there, if
    none fit this run (another `model.dtype`, `distill.batch_size` or `distill.init`, an interval that they lack, or
    too few steps), or if several do.
    """
    folder = boundaries_folder(run)
    found = [folder / "boundaries.json"]  # written last: it says that the rest is complete
    if not found[0].exists():
        found = sorted(folder.glob("*/boundaries.json"))
    if not found:
        config = run.config.distill
        raise UsageError(
            f"{folder} holds no boundaries, or not all of them: run 'stages=[boundaries]' first, with just these "
            f"settings (distill.steps={config.steps} distill.batch_size={config.batch_size} "
            f"distill.replay={config.replay})."
        )
    records = {path.parent: read_json(path, "The record of boundaries", "boundaries") for path in found}
    misfits = {path: _misfit(run, path, record["made_from"]) for path, record in records.items()}
    fitting = [path for path, misfit in misfits.items() if misfit is None]
    if not fitting:
        raise UsageError(next(filter(None, misfits.values())))
    if len(fitting) > 1:
        raise UsageError(
            f"distill.boundaries={folder} holds {len(fitting)} sets of boundaries that fit "
            f"({', '.join(path.name for path in fitting)}): add the name of one to it."
        )
    return fitting[0], records[fitting[0]]


def boundaries_identity(run: Run) -> str:
    """Return the fingerprint of the boundaries that students are trained from, which their own headers hold.

    Boundaries of some of the run's intervals count as those of all: other intervals do not change them.
    """
    _, record = stored_boundaries(run)
    written, own = record["made_from"]["intervals"], {s: [list(p) for p in pairs] for s, pairs in run.intervals.items()}
    if all(pair in written.get(stack, []) for stack, pairs in own.items() for pair in pairs):
        return record["fingerprint"]
    return Header(record["format"], record["made_from"] | {"intervals": own}).fingerprint


def _misfit(run: Run, folder: Path, made_from: dict[str, Any]) -> str | None:
    """Return the sentence that says why the boundaries in `folder` do not fit this run; None if they do."""
    distill = run.config.distill
    given = {
        "model.dtype": (made_from["model"]["dtype"], run.config.model.dtype),
        "distill.batch_size": (made_from["batch_size"], distill.batch_size),
        "distill.init": (made_from["init"], distill.init),
    }
    for key, (written, asked) in given.items():
        if written != asked:
            return f"{folder} was written with {key}={written}, not {asked}: set {key}={written}."
    for stack, pairs in asked_for(run).items():
        there = made_from["intervals"].get(stack, [])
        missing = [list(pair) for pair in pairs if list(pair) not in there]
        if missing:
            return f"{folder} has no boundaries of {stack} {missing[0]}: run 'stages=[boundaries]' for it."
    if made_from["steps"] < num_stored(run):
        return (
            f"{folder} holds {made_from['steps']} steps, and distill.steps={distill.steps} with "
            f"distill.replay={distill.replay} needs {num_stored(run)}: raise distill.replay, or write boundaries for "
            "more steps."
        )
    return None


def initial_students(run: Run, intervals: Intervals, folder: Path, fingerprint: str) -> dict[str, nn.Module]:
    """Return the students of `intervals` by plug name, with the initial weights stored in `folder`, all trainable.

    `fingerprint`: that of the boundaries in `folder`.

    The teacher's weights are not needed: the blocks' structure comes from a model on the meta device.
    """
    with torch.device("meta"):
        teacher = run.family.transformer_class.from_config(run.config.model.arch)
    students = {}
    for stack, pairs in intervals.items():
        for pair in pairs:
            name = plug_name(stack, pair)
            student = copy.deepcopy(stack_of(teacher, stack)[pair[0]])
            state, _ = read_tensors(folder / name / "init.safetensors", "boundaries", fingerprint)
            student.load_state_dict(state, assign=True)
            students[name] = student.requires_grad_(True)
    return students
