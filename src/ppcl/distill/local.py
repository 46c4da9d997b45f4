"""The base of depth and width distillation: parts of a model learn beside a frozen teacher, each on its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ppcl.config import DistillConfig
from ppcl.data.batches import TrainingBatch
from ppcl.distill.losses import Terms, distill_losses, stream_terms
from ppcl.distill.objective import ManualOptimization
from ppcl.families.base import Family
from ppcl.ops.losses import Average, norm_ratio
from ppcl.parallel import mean_terms
from ppcl.precision import computing
from ppcl.taps import Streams
from ppcl.training.optimizers import adamw, cosine_schedule
from ppcl.training.sharding import Sharding

_AVERAGE_DECAY = 0.98


class LocalDistillation(ManualOptimization):
    """Trains `parts`, by name, on losses that a teacher's pass calls up one part at a time.

    A part's loss is back-propagated as soon as it is known and its graph freed, so that one graph exists
    at a time; parts share no gradient, so any subset of them trains to the same weights.

    The teacher is held outside the module tree: it is neither saved, moved by Lightning, nor trained.
    Parts are held in float32 whatever it is in, and compute in `precision`.
    """

    stage_name: str
    lr_key: str  # what to lower where the loss explodes

    def __init__(
        self,
        family: Family,
        teacher: nn.Module,
        parts: Mapping[str, nn.Module],
        config: DistillConfig,
        precision: str = "32-true",
    ) -> None:
        super().__init__()
        self._teacher: tuple[nn.Module] = (teacher.requires_grad_(False),)
        self.family, self.config, self.precision = family, config, precision
        self.is_sharded = False
        self.loss_weights = distill_losses(config)
        self.names = list(parts)
        self.parts = nn.ModuleDict({self.key(name): part for name, part in parts.items()}).requires_grad_(True)
        from diffusers.training_utils import cast_training_params  # loads pipelines, which takes seconds

        cast_training_params(self.parts)
        self.average_losses: Tensor
        self.average_steps: Tensor
        self.register_buffer("average_losses", torch.zeros(len(parts)))
        self.register_buffer("average_steps", torch.zeros(()))

    @staticmethod
    def key(name: str) -> str:
        return name.replace(".", ":")  # ModuleDict keys hold no dot

    def shard(self, sharding: Sharding) -> None:
        """Leave of the teacher and of the parts this rank's shards."""
        self.is_sharded = True
        sharding.model(self.family, self._teacher[0])
        self.average_losses, self.average_steps = (
            buffer.to(sharding.device) for buffer in (self.average_losses, self.average_steps)
        )

    def setup(self, stage: str) -> None:
        self._teacher[0].eval()
        if not self.is_sharded:
            self._teacher[0].to(self.device)

    @abstractmethod
    def each_loss(self, batch: TrainingBatch, visit: Callable[[int, Terms], None]) -> None:
        """Run the teacher and call `visit(number, terms)` for each part; what it does not keep is freed.

        `terms["loss"]` is what the part descends; the rest is logged.
        """

    def call(self, stack: str, block: nn.Module, kwargs: dict[str, Any], inputs: Mapping[str, Any]) -> Streams:
        """Streams that a trainable block, or one with trainable parts, returns for the arguments `kwargs`.

        `inputs` are those of the teacher's whole forward.
        """
        device = next(value.device for value in kwargs.values() if isinstance(value, Tensor))
        with computing(self.precision, device):
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                output = checkpoint(partial(block, **kwargs), use_reentrant=False)
            else:
                output = block(**kwargs)
        return self.family.streams_out(stack, output, inputs)

    def output_terms(
        self, student: Streams, teacher: Streams, masks: dict[str, Tensor | None], average: Average
    ) -> tuple[Terms, Terms]:
        """The losses of a block's output per stream (Eq. 6), and beside them what is only logged: the norm ratios."""
        descended: Terms = {}
        logged: Terms = {}
        for stream, target in teacher.items():
            arguments = student[stream], target, masks[stream], average
            descended |= stream_terms(self.loss_weights, stream, *arguments)
            logged[f"{stream}_norm_ratio"] = norm_ratio(*arguments)
        return descended, logged

    def learn(self, batch: TrainingBatch, done: Callable[[nn.Module], None] | None = None) -> list[Terms]:
        """Back-propagate every part's loss, `done` with each as soon as it has its gradient; returns what is logged."""
        logged: list[Terms] = [{} for _ in self.names]

        def descend(number: int, terms: Terms) -> None:
            self.manual_backward(terms["loss"])
            logged[number] = {key: value.detach() for key, value in terms.items()}
            if done is not None:
                done(self.parts[self.key(self.names[number])])

        self.each_loss(batch, descend)
        return logged

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        logged = mean_terms(self.learn(batch, self._descend), batch.average)
        self._descend(*self.parts.values())  # of a chain, which has its gradients at once
        optimizer.step()  # no gradient is left: it is what Lightning counts
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        losses = torch.stack([terms["loss"] for terms in logged])
        self.average_steps += 1
        # A plain mean at first, then an exponential one.
        self.average_losses.lerp_(losses, max(1 / self.average_steps.item(), 1 - _AVERAGE_DECAY))
        self.log(f"{self.stage_name}/loss", losses.sum(), prog_bar=True, batch_size=len(batch.sigmas))
        trainer: Any = self.trainer
        if self.global_step % trainer.log_every_n_steps == 0:  # many values, which cost a tenth of a tiny step
            for name, terms in zip(self.names, logged, strict=True):
                values = {f"{self.stage_name}/{name}/{key}": value for key, value in terms.items()}
                self.log_dict(values, batch_size=len(batch.sigmas))
        total = losses.sum()
        self.refuse_infinite(total, {self.lr_key: self.config.lr})
        return total

    def _descend(self, *parts: nn.Module) -> None:
        """Take the step of those parts that have gradients, which then go."""
        ready = [part for part in parts if any(parameter.grad is not None for parameter in part.parameters())]
        if not ready:
            return
        for part in ready:
            self.prepare_gradients(part.parameters(), self.config.max_grad_norm)  # each its own: parts stay uncoupled
        optimizer: Any = self.optimizers()
        optimizer.optimizer.step()
        for part in ready:
            part.zero_grad()

    @torch.no_grad()
    def heldout(self, batches: Iterable[TrainingBatch]) -> list[dict[str, float]]:
        """Mean terms per part, with the teacher's inputs, without training."""
        sums: list[dict[str, float]] = [{} for _ in self.names]
        count = 0
        for batch in batches:
            found: list[Terms] = [{} for _ in self.names]
            self.each_loss(batch, found.__setitem__)
            for total, terms in zip(sums, mean_terms(found, batch.average), strict=True):
                for key, value in terms.items():
                    total[key] = total.get(key, 0.0) + value.item()
            count += 1
        return [{key: value / count for key, value in terms.items()} for terms in sums]

    def configure_optimizers(self) -> tuple[list, list]:
        config = self.config
        optimizer = adamw(self.parts.parameters(), config)
        return [optimizer], [cosine_schedule(optimizer, config)]
