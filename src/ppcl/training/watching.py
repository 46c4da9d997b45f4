"""Watches a training: rates, gradients, speed and memory for the logger, held-out losses and sample pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import lightning as L
import psutil
import torch

from ppcl.artifacts.curves import Curve, curve_path, forget_curves
from ppcl.artifacts.headers import Header
from ppcl.config import WatchConfig
from ppcl.context import Run
from ppcl.distill.objective import ManualOptimization
from ppcl.errors import UsageError
from ppcl.parallel import together
from ppcl.training.drawing import SamplePictures

_STEPS = 1.3  # that a held-out batch takes, by experiments/scale/watching.json: more than its loss is measured

HeldOut = Callable[[int], Mapping[str, float]]
"""Returns the loss of each part that is trained, by its name, on so many held-out batches."""


def measured_steps(settings: WatchConfig, num_steps: int) -> list[int]:
    """Return the steps after which held-out losses are measured: evenly spaced, with 0 and the last one.

    They are `watch.heldout` after 0, or fewer, so that they take at most about `watch.share` of the time of the steps.
    Where that allows less than two measurements there are none.
    """
    allowed = int(settings.share * num_steps / (settings.batches * _STEPS)) - 1  # one is needed at step 0
    count = min(settings.heldout, allowed, num_steps)
    return [round(number * num_steps / count) for number in range(count + 1)] if count > 0 else []


class Watching(L.Callback):
    """Logs what happens in a training beside its losses, and measures held-out losses on the way.

    Every few steps the logger gets the learning rates, the gradients' norm, samples per second and memory. Held-out
    losses also go to `training/curves/`, from where the report takes them. A resumed training continues its curve, and
    its sample pictures.

    Nothing of this moves the random numbers of the training, which is the same to the bit without it.

    `header`: identifies the training. `batch_size`: samples of a step. `heldout`: None for a training that has no
    held-out losses. `pictures`: draws sample pictures; None for a training that has none.
    """

    def __init__(
        self,
        run: Run,
        stage: str,
        header: Header,
        batch_size: int,
        heldout: HeldOut | None,
        pictures: SamplePictures | None = None,
    ) -> None:
        self.run, self.stage, self.batch_size, self.heldout, self.pictures = run, stage, batch_size, heldout, pictures
        self.path = curve_path(run.folder, stage, header)
        self.steps: list[int] = []
        self.curve = Curve([], [])
        self._since, self._counted, self._spent = 0.0, 0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.heldout is not None:
            settings = self.run.config.watch
            self.steps = measured_steps(settings, trainer.max_steps)
            if settings.heldout and not self.steps:
                self.run.say(
                    self.stage,
                    f"held-out losses are measured before and after the training only: {trainer.max_steps} steps are "
                    f"too few for watch.share={settings.share:g}",
                )
        if trainer.global_step and self.path.exists():
            self.curve = Curve.load(self.path).until(trainer.global_step)
        elif 0 in self.steps:
            self._measure(trainer, pl_module)
        if self.pictures is not None:
            with together():  # rank 0 reads files, and may fail
                self.pictures.start(trainer.global_step)
            self._draw(trainer)
        self._since, self._counted, self._spent = time.perf_counter(), trainer.global_step, 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        logging: Any = trainer
        if trainer.global_step % logging.log_every_n_steps == 0:
            self._log(trainer, pl_module)
        start = time.perf_counter()
        if trainer.global_step in self.steps:
            self._measure(trainer, pl_module)
        self._draw(trainer)
        self._spent += time.perf_counter() - start

    def _draw(self, trainer: L.Trainer) -> None:
        """Let rank 0 draw the sample pictures that are due after this step, while the others wait."""
        if self.pictures is None or not self.pictures.is_due(trainer.global_step):
            return
        with together():
            if self.run.writes:
                self.pictures.draw(trainer.global_step, trainer.logger)

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ManualOptimization), "all trainings are"
        metrics = {f"{self.stage}/gradient_norm": norm for norm in [pl_module.gradient_norm()] if norm is not None}
        group = trainer.optimizers[0].param_groups[0]
        factor = group["lr"] / group["initial_lr"] if group.get("initial_lr") else 1.0
        for key, rate in pl_module.rates().items():
            if rate is not None:
                metrics[f"{self.stage}/{key.rpartition('.')[2]}"] = rate * factor
        seconds = time.perf_counter() - self._since - self._spent
        samples = self.batch_size * (trainer.global_step - self._counted)
        metrics[f"{self.stage}/samples_per_second"] = samples / max(seconds, 1e-9)
        device = trainer.strategy.root_device
        used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
        metrics[f"{self.stage}/memory_gb"] = used / 1e9
        self._since, self._counted, self._spent = time.perf_counter(), trainer.global_step, 0.0
        pl_module.log_dict(metrics, batch_size=self.batch_size)  # beside the losses of this step

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the held-out losses, on all ranks, and add them to the curve and to the log."""
        assert self.heldout is not None
        step, device = trainer.global_step, trainer.strategy.root_device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            losses = dict(self.heldout(self.run.config.watch.batches))
        wrong = [name for name, loss in losses.items() if not isfinite(loss)]
        if wrong:
            raise UsageError(
                f"{self.stage}: the held-out loss of {wrong[0]} is {losses[wrong[0]]} after step {step}: lower "
                f"{' and '.join(getattr(pl_module, 'rates', dict)())}. The last checkpoint is intact."
            )
        self.curve = self.curve.until(step - 1).then(step, losses)
        if not self.run.writes:
            return
        if not step:
            forget_curves(self.path.parent, self.stage, losses)
        self.curve.save(self.path)
        if trainer.logger is not None:
            metrics = {f"{self.stage}/heldout": sum(losses.values()) / len(losses)}
            if len(losses) > 1:
                metrics |= {f"{self.stage}/{name}/heldout": loss for name, loss in losses.items()}
            trainer.logger.log_metrics(metrics, step)
