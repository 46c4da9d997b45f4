"""The teacher's velocities on disk, so that a model can be tuned on them without the teacher in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ppcl.artifacts.headers import Header
from ppcl.artifacts.tensors import read_tensors, write_tensors
from ppcl.data.batches import TrainingBatch

STEPS_PER_FILE = 16
Batches = Callable[[int], list[TrainingBatch]]  # the batches of a step, by its number


@dataclass(frozen=True)
class Targets:
    """The teacher's velocity for the batches of numbered steps, in files of `STEPS_PER_FILE` steps.

    `header` identifies teacher, data and batches. Files are written whole or not at all.
    """

    folder: Path
    header: Header

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def missing(self, steps: Iterable[int]) -> list[int]:
        """Return the numbers of the files that these steps need and that are not there."""
        numbers = {step // STEPS_PER_FILE for step in steps}
        return sorted(number for number in numbers if not self._file(number).exists())

    @torch.no_grad()
    def write(self, number: int, batches: Batches, velocity: Callable[[TrainingBatch], Tensor]) -> None:
        """Write file `number`, with the `velocity` of each of its steps' batches."""
        tensors = {}
        for step in range(number * STEPS_PER_FILE, (number + 1) * STEPS_PER_FILE):
            tensors[str(step)] = torch.cat([velocity(batch) for batch in batches(step)]).cpu()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self._file(number), tensors, {"fingerprint": self.header.fingerprint})

    def on(self, step: int, batches: Sequence[TrainingBatch]) -> list[TrainingBatch]:
        """Return the batches of a step with the teacher's velocity."""
        parts = _read(self._file(step // STEPS_PER_FILE), self.header.fingerprint)[str(step)].chunk(len(batches))
        return [replace(batch, teacher=part) for batch, part in zip(batches, parts, strict=True)]


@lru_cache(maxsize=2)
def _read(path: Path, fingerprint: str) -> dict[str, Tensor]:
    return read_tensors(path, "finetune", fingerprint)[0]
