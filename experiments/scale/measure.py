"""Time several ways in turns, compute ratios and their spread, and measure the time and memory of training steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import nn

from ppcl.data.batches import StepLoader, TrainingBatch
from ppcl.efficiency import LiveBytes


def in_turns(ways: Mapping[str, Callable[[], Iterable[float]]], rounds: int) -> dict[str, list[float]]:
    """Run the ways in turns, A B C A B C, `rounds` times; return the seconds of each.

    Other load on the machine then affects all of them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name] += way()
    return seconds


def speedup(seconds: Mapping[str, Sequence[float]], slow: str, fast: str, unit: str) -> dict[str, Any]:
    """Return how many times as fast `fast` is as `slow`: ratio of medians, lowest and highest ratio of single turns."""
    ratios = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    medians = {name: statistics.median(seconds[name]) for name in (slow, fast)}
    return {
        "ratio": medians[slow] / medians[fast],
        "of": medians,
        "unit": unit,
        "lowest": min(ratios),
        "highest": max(ratios),
        "turns": len(ratios),
    }


def fit(
    module: L.LightningModule,
    batch: TrainingBatch,
    steps: int,
    callback: L.Callback,
    accelerator: str = "cpu",
) -> None:
    """Train for `steps` steps on one batch by Lightning's loop, without writing anything to disk."""
    trainer = L.Trainer(
        max_steps=steps,
        accelerator=accelerator,
        devices=1,
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, StepLoader(lambda step: batch, steps))


class StepTimes(L.Callback):
    """Records the seconds of each step, except for the first `skip` steps, which allocate memory."""

    def __init__(self, skip: int) -> None:
        self.skip = skip
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.start = self.now()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= self.skip:
            self.seconds.append(self.now() - self.start)

    @staticmethod
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class StepMemory(L.Callback):
    """Records the peak, in bytes, of tensors that the second step makes: gradients, activations and temporaries.

    With `given_gradients` the gradients exist before that step. Then only activations and temporaries are counted.
    """

    def __init__(self, given_gradients: bool) -> None:
        self.given_gradients = given_gradients

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.recorder = LiveBytes() if batch_idx == 1 else None
        if self.recorder is not None:
            if self.given_gradients:
                for parameter in pl_module.parts.parameters():
                    parameter.grad = torch.zeros_like(parameter)
            self.recorder.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.recorder is not None:
            self.recorder.__exit__(None, None, None)
            self.peak = self.recorder.peak


def step_memory_mb(module: Any, batch: TrainingBatch) -> dict[str, float]:
    """Return the peak memory of a step above the teacher's weights, in MB (1e6 bytes), counted in two ways.

    `activations`: activations and temporaries alone. `with_students`: also the students' weights, gradients and the two
    states of AdamW.
    """
    peaks = {}
    for name, given in (("activations", True), ("with_students", False)):
        meter = StepMemory(given)
        fit(module, batch, 2, meter)
        peaks[name] = meter.peak / 1e6
    peaks["with_students"] += 3 * weight_bytes(module.parts) / 1e6
    return peaks


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())
