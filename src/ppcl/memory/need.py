"""Holds what a stage needs, measures what the device has, and tells whether the one fits into the other."""

from __future__ import annotations

from dataclasses import dataclass, field

import psutil
import torch

from ppcl.context import Run

RESERVED = 1.2e9  # of the device, by CUDA, its libraries, and kernels for themselves
SLACK = 1.05  # fragmentation of the allocator


@dataclass
class Need:
    """The needs of one stage: bytes on the device by what they hold, bytes that it writes to disk, and hours.

    `host`: bytes in host memory, also by what they hold, where they are many. Weights that are mapped from their files
    count too, although the system can do with fewer of them at a time. `note`: how the stage goes about it.
    """

    stage: str
    device: dict[str, float]
    disk: float = 0.0
    hours: float | None = None
    host: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def total(self) -> float:
        """Bytes on the device in all."""
        return sum(self.device.values())


def capacity(run: Run) -> float:
    """Return the bytes of the run's device in all, or those that `trainer.memory_gb` says."""
    if run.config.trainer.memory_gb is not None:
        return 1e9 * run.config.trainer.memory_gb
    if run.device.type == "cuda":
        return torch.cuda.get_device_properties(run.device).total_memory
    return psutil.virtual_memory().total


def fits(needed: float, room: float) -> bool:
    """Return whether `needed` bytes fit on a device of `room` bytes."""
    return needed * SLACK + RESERVED <= room
