"""Saves the checkpoints of a training, and checks that the disk has room for them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from math import ceil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from ppcl.artifacts.files import write_json
from ppcl.artifacts.headers import Header
from ppcl.config import PretrainConfig, TrainingConfig
from ppcl.context import Run
from ppcl.disk import check_space, in_bytes
from ppcl.distill.objective import ManualOptimization
from ppcl.errors import UsageError
from ppcl.parallel import largest, together
from ppcl.training.states import state_bytes
from ppcl.training.stops import Stop

CHECKPOINT = "last.ckpt"
FINGERPRINT = "ppcl_fingerprint"  # the key of a checkpoint that says which training it belongs to
LARGE = 1e9  # bytes; of larger checkpoints the size and the time to save one are printed
_ASSUMED_SPEED = 1e9  # bytes a second, until a checkpoint has been saved


class Checkpoints(L.Callback):
    """Saves `last.ckpt` in `folder` at the end of a step: after so many steps or minutes, and when a signal says stop.

    A training that ends before the first checkpoint is due saves one then, to have it while its results are measured.
    All ranks save at the same step. Weights that are not finite raise `UsageError` there and at the end, and are not
    saved. Before the first step, the disk is checked and `checkpoint.json` is written, which identifies the training by
    `header`.

    `settings`: the training's `checkpoint_every` and `checkpoint_minutes`.
    `stop`: notes that signal. The training ends once its checkpoint is saved.
    """

    def __init__(
        self,
        run: Run,
        stage: str,
        folder: Path,
        header: Header,
        settings: TrainingConfig | PretrainConfig,
        stop: Stop,
    ) -> None:
        self.run, self.stage, self.folder, self.header = run, stage, folder, header
        self.settings, self.stop = settings, stop
        self.size = 0
        self._steps = self._saves = 0

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[FINGERPRINT] = self.header.fingerprint

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raise `UsageError` for a checkpoint of another training, whose record was put beside it."""
        if checkpoint.get(FINGERPRINT, self.header.fingerprint) != self.header.fingerprint:
            raise UsageError(
                f"{self.folder} holds the checkpoint of another training: delete {self.folder} to train anew."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise `UsageError` if the disk has no room for two checkpoints: one lies there while the next is written."""
        self.size = checkpoint_bytes(pl_module, trainer.optimizers)
        with together():
            if self.run.writes:
                here = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
                remedy = "make room, or use a larger disk (paths.runs_dir=)"
                check_space(self.folder, 2 * self.size - here, "two checkpoints of this training", remedy)
                write_json(self.folder / "checkpoint.json", self.header.to_json())
        if self.size > LARGE:
            seconds = self.size / _ASSUMED_SPEED
            self.run.say(
                self.stage,
                f"a checkpoint takes {in_bytes(self.size)}, twice that while one is saved, and {seconds:.0f} s if the "
                f"disk writes 1 GB/s, which is a guess: under SLURM use --signal=USR1@{warning_seconds(seconds)}",
            )
        self._began = self._saved = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._steps += 1
        minutes = self.settings.checkpoint_minutes
        late = minutes is not None and time.monotonic() - self._saved >= 60 * minutes
        self.stop.agreed, any_late = largest(self.stop.noted, int(late))
        step = trainer.global_step
        only = step >= trainer.max_steps and not self._saves
        saves = self.stop.agreed or any_late or step % self.settings.checkpoint_every == 0 or only
        if (saves or step >= trainer.max_steps) and isinstance(pl_module, ManualOptimization):
            pl_module.refuse_infinite_weights()
        if saves:
            self._save(trainer)
        if self.stop.agreed:
            self.run.say(self.stage, f"saved step {step} of {trainer.max_steps} in {self.folder}")
            trainer.should_stop = True

    def _save(self, trainer: L.Trainer) -> None:
        before = time.monotonic()
        trainer.save_checkpoint(self.folder / CHECKPOINT)
        self._saved = time.monotonic()
        self._saves += 1
        if self.size > LARGE and self._saves == 1:
            seconds, step_seconds = self._saved - before, (before - self._began) / self._steps
            self.run.say(
                self.stage,
                f"the first checkpoint took {seconds:.0f} s to save: "
                f"--signal=USR1@{warning_seconds(seconds, step_seconds)} is enough",
            )


def warning_seconds(save_seconds: float, step_seconds: float = 0.0) -> int:
    """Return how many seconds ahead a training should be warned that it will be ended.

    Twice the time of a step and of saving a checkpoint, and half a minute, in tens of seconds.
    """
    return 10 * ceil((2 * (save_seconds + step_seconds) + 30) / 10)


def checkpoint_bytes(module: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Return the size of a checkpoint of `module` and its optimisers in bytes, over all ranks together.

    AdamW keeps two tensors of the size of each parameter, Muon one. Parameters that never get a gradient are counted
    as well, though they have none.
    """
    size = sum(value.nbytes for value in module.state_dict().values())  # of a sharded tensor, those of all shards
    for optimizer in optimizers:
        kept, states = 2 if isinstance(optimizer, torch.optim.AdamW) else 1, getattr(optimizer, "states", "float32")
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        size += kept * sum(state_bytes(weight, states) for weight in weights)
    return size
