"""Batches like recorded calls, without their content, to count what a forward needs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ppcl.artifacts.files import read_json
from ppcl.data.batches import TrainingBatch
from ppcl.data.recording.files import ARGUMENTS, OUTPUT, read_joining
from ppcl.data.recording.nested import joined, unpacked
from ppcl.families.base import Family


def blank_calls(family: Family, folder: Path, count: int) -> TrainingBatch:
    """Return a batch of `count` calls that have the shapes of the first recorded call, with empty tensors.

    Calls that cannot be joined are one. Raises `FileNotFoundError` if nothing is recorded in `folder`.
    """
    record = next(iter(sorted(folder.glob("[0-9]*.json"))), None)
    if record is None:
        raise FileNotFoundError(f"{folder} has no recorded call")
    content, axes = read_json(record, "A recording's prompt", "cache"), read_joining(folder).axes
    call = content["calls"][0]

    def empty(name: str) -> Tensor:
        dtype, *shape = content["tensors"][name]
        return torch.empty(shape, dtype=getattr(torch, dtype))

    count = 1 if axes is None else count
    inputs, output = (joined([unpacked(call[key], empty)] * count, axes or {}, key) for key in (ARGUMENTS, OUTPUT))
    target = family.as_tensor(output)[:, : call["used"]]
    sigmas, whole = torch.empty(len(target)), isinstance(output, dict)
    return TrainingBatch(inputs, target, sigmas, as_tensor=family.as_tensor, whole=whole)
