"""Measures the cost of a training: its seconds, and the peak memory of a step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ppcl.artifacts.files import read_json, write_json
from ppcl.context import Run
from ppcl.efficiency import LiveBytes
from ppcl.stages import STAGES

COSTS = ("steps", "seconds", "seconds_per_step", "peak_memory_mb")  # the numbers in a record
_MEASURED_STEP = 2  # counted from 0 in this process; by then gradients and optimiser states have been allocated


class TrainingCost(L.Callback):
    """Writes `{"steps", "seconds", "seconds_per_step", "peak_memory_mb"}` to the JSON file `path` when training ends.

    Only rank 0 is measured, and only steps of this process: a resumed training does not count earlier ones. Memory is
    in MB (1e6 bytes). On a GPU it is the allocator's peak during the training; on a CPU the peak of live tensors,
    weights included, in the third step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = 0.0
        self.steps = 0
        self.peak_bytes = 0
        self._recorder: LiveBytes | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.strategy.root_device.type == "cpu" and self.steps == _MEASURED_STEP:
            recorder = LiveBytes()
            recorder.__enter__()
            self._recorder = recorder  # only now: after Ctrl-C, `on_exception` must not stop one that never started
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._recorder is not None:
            self.peak_bytes = self._recorder.resident + self._recorder.peak
            self.on_exception(trainer, pl_module, None)
        else:  # recording makes a step slower, so its time is left out
            self.seconds += time.perf_counter() - self._start
        self.steps += 1

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: Any) -> None:
        if self._recorder is not None:
            self._recorder.__exit__(None, None, None)
            self._recorder = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.should_stop:  # a stopped training has not ended
            return
        device = trainer.strategy.root_device
        if device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(device)
        counted = max(1, self.steps - (1 if device.type == "cpu" and self.steps > _MEASURED_STEP else 0))
        content = {
            "steps": self.steps,
            "seconds": self.seconds,
            "seconds_per_step": self.seconds / counted,
            "peak_memory_mb": self.peak_bytes / 1e6,
        }
        write_json(self.path, content)


def total_cost(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the cost of several trainings, one after another, with the keys that `TrainingCost` writes."""
    steps, seconds = (sum(cost[key] for cost in costs) for key in ("steps", "seconds"))
    return {
        "steps": steps,
        "seconds": seconds,
        "seconds_per_step": seconds / max(1, steps),
        "peak_memory_mb": max(cost["peak_memory_mb"] for cost in costs),
    }


def trainings_of(run: Run) -> dict[str, dict[str, float]]:
    """Return the cost of each training by its stage, including those of the run in `paths.base_run`.

    A record that lacks a number is left out.
    """
    found = {}
    for folder in (run.base, run.folder):
        for path in (folder / "training").glob("*.json"):
            cost = read_json(path, "The cost of a training", "report")
            if all(isinstance(cost.get(key), (int, float)) for key in COSTS):
                found[path.stem] = cost
    order = list(STAGES)
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))
