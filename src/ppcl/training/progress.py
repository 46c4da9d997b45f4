"""Progress of a training, in optimisation steps: Lightning's own bar counts epochs of a loader."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ppcl.progress import Clock, Lines, Part, WholeColumn, draws_bars


class StepProgress(L.Callback):
    """Shows the stage's name, the steps done, the loss and the time left.

    A terminal gets a bar that disappears at the end, any other console plain lines (`ppcl.progress`). `part`: which of
    several trainings of a stage this is.
    """

    def __init__(
        self, description: str, console: Console, clock: Clock = time.monotonic, part: Part | None = None
    ) -> None:
        self.description, self.console, self.clock, self.part = description, console, clock, part
        self._bar: Progress | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total, done = trainer.max_steps, trainer.global_step
        if draws_bars(self.console):
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[loss]}"),
                WholeColumn(self.part),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=total, completed=done, loss="")
        else:
            self._lines = Lines(
                self.console, self.description, total, done=done, unit="step ", part=self.part, clock=self.clock
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = trainer.global_step
        if self._bar is not None:
            self._bar.update(self._task, completed=done, loss=f"loss {float(outputs['loss']):.4f}")
        elif self._lines.due(done) or (done == trainer.max_steps and self._lines.last > self._lines.first):
            # A log that has shown steps shows the last one, too: losses are measured after it, which may take minutes.
            self._lines.write(done, f"loss {float(outputs['loss']):.4f}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.stop()
