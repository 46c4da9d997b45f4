"""Base class of depth and width distillation: parts of a model are trained against a frozen teacher, independently."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ppcl.config import DistillConfig
from ppcl.data.batches import TrainingBatch
from ppcl.distill.losses import Terms, distill_losses, stream_terms
from ppcl.distill.objective import ManualOptimization, listed, mean_of
from ppcl.families.base import Family
from ppcl.ops.losses import Average, norm_ratio
from ppcl.parallel import mean_terms
from ppcl.precision import computing
from ppcl.streaming import MOST_ABREAST, is_streamed
from ppcl.taps import BlockCall, BlockKey, Streams, observe_each
from ppcl.training.optimizers import cosine_schedule, optimizers_of
from ppcl.training.sharding import Sharding

_AVERAGE_DECAY = 0.98


def device_of(kwargs: Mapping[str, Any]) -> torch.device:
    """Return the device of the first tensor in the keyword arguments of a block's call."""
    return next(value.device for value in kwargs.values() if isinstance(value, Tensor))


class LocalDistillation(ManualOptimization):
    """Trains `parts` (modules by name) against a frozen teacher, each on a loss of its own.

    One forward of the teacher gives the losses of all parts, one after another (`each_loss`). Each loss is
    back-propagated as soon as it is computed and its graph freed, so that one part's graph is in memory at a time.
    Parts share no gradient, so training any subset of them gives the same weights.

    Trainable parameters are float32 whatever the teacher's dtype; with `precision="bf16-mixed"` they compute under
    autocast. The teacher is kept out of the module tree, so that Lightning neither saves, moves nor trains it.
    """

    stage_name: str  # prefix of logged names
    lr_key: str  # the configuration key of `lr`
    relative_key = "distill.relative_update"

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
        return name.replace(".", ":")  # a key of a ModuleDict must not contain a dot

    def shard(self, sharding: Sharding) -> None:
        """Shard the teacher over the ranks. Subclasses shard their parts first."""
        self.is_sharded = True
        sharding.model(self.family, self._teacher[0])
        self.average_losses, self.average_steps = (
            buffer.to(sharding.device) for buffer in (self.average_losses, self.average_steps)
        )

    def setup(self, stage: str) -> None:
        self._teacher[0].eval()
        if not self.is_sharded:
            self._teacher[0].to(self.device)

    @property
    @abstractmethod
    def last(self) -> BlockKey:
        """The block that the teacher's forward stops after."""

    @abstractmethod
    def watch(self, batch: TrainingBatch, visit: Callable[[int, Terms], None]) -> Callable[[BlockCall], None]:
        """Return what is to be called after each block of the teacher's forward on `batch`.

        It calls `visit` as `each_loss` does.
        """

    def each_loss(self, batch: TrainingBatch, visit: Callable[[int, Terms], None]) -> None:
        """Run the teacher and call `visit(number, terms)` once for each part, numbered as in `names`.

        `terms` are scalars: `terms["loss"]` is to be back-propagated, the others are logged. A part's graph is freed
        when `visit` returns, unless `visit` keeps a reference to its terms.
        """
        self.each_loss_abreast([batch], [visit])

    def each_loss_abreast(
        self, batches: Sequence[TrainingBatch], visits: Sequence[Callable[[int, Terms], None]]
    ) -> None:
        """Do as `each_loss` for several batches, of which `visits` has a function each. They pass each block together.

        A streamed teacher is then read once.
        """
        watches = [self.watch(batch, visit) for batch, visit in zip(batches, visits, strict=True)]
        with torch.no_grad():
            observe_each(self.family, self._teacher[0], [batch.inputs for batch in batches], watches, last=self.last)

    def abreast(self, batches: Iterable[TrainingBatch]) -> Iterator[list[TrainingBatch]]:
        """Yield `batches` one by one, or for a streamed teacher by eight, for which it is read once."""
        streamed = any(is_streamed(module) for module in self._teacher[0].modules())
        rest = iter(batches)
        while group := list(islice(rest, MOST_ABREAST if streamed else 1)):
            yield group

    def call(self, stack: str, block: nn.Module, kwargs: dict[str, Any], inputs: Mapping[str, Any]) -> Streams:
        """Call `block`, which has trainable parameters, and return its output streams `[B, tokens, D]` by name.

        Runs under autocast if `precision` asks for it, with gradient checkpointing if
        `distill.gradient_checkpointing` is set.

        `stack`: the stack that the block belongs to. `kwargs`: the block's keyword arguments. `inputs`: the inputs of
        the teacher's whole forward, by which some families find streams in an output.
        """
        with computing(self.precision, device_of(kwargs)):
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                output = checkpoint(partial(block, **kwargs), use_reentrant=False)
            else:
                output = block(**kwargs)
        return self.family.streams_out(stack, output, inputs)

    def output_terms(
        self,
        student: Streams,
        teacher: Streams,
        masks: dict[str, Tensor | None],
        average_of: Callable[[str], Average],
    ) -> tuple[Terms, Terms]:
        """Return the losses of a block's output per stream, weighted by `distill.losses`, and norm ratios.

        Norm ratios are only logged.

        `student`, `teacher`: output streams `[B, tokens, D]`. `masks`: valid tokens `[B, tokens]` per stream, None for
        all. `average_of`: for each stream, what turns a denominator into the whole step's.
        """
        descended: Terms = {}
        logged: Terms = {}
        for stream, target in teacher.items():
            arguments = student[stream], target, masks[stream], average_of(stream)
            descended |= stream_terms(self.loss_weights, stream, *arguments)
            logged[f"{stream}_norm_ratio"] = norm_ratio(*arguments)
        return descended, logged

    def learn(
        self, batch: TrainingBatch, done: Callable[[nn.Module], None] | None = None, share: float = 1.0
    ) -> list[Terms]:
        """Back-propagate the loss of every part and return each part's terms, detached.

        `done(part)` is called as soon as a part has its gradient, before the next part's loss is computed. `share`:
        what the batch is of a step's samples; the gradients are so much of a whole batch's.
        """
        return self._learn([batch], done, share)[0]

    def _learn(
        self, batches: Sequence[TrainingBatch], done: Callable[[nn.Module], None] | None, share: float
    ) -> list[list[Terms]]:
        """Do as `learn` for batches that pass the teacher together, and return the terms for each.

        With several, `done` must be None: parts that end at one block have their gradients together.
        """
        logged: list[list[Terms]] = [[{} for _ in self.names] for _ in batches]

        def descend(found: list[Terms], number: int, terms: Terms) -> None:
            self.manual_backward(terms["loss"] * share)
            found[number] = {key: value.detach() for key, value in terms.items()}
            if done is not None:
                done(self.parts[self.key(self.names[number])])

        self.each_loss_abreast(batches, [partial(descend, found) for found in logged])
        return logged

    def training_step(self, batch: TrainingBatch | list[TrainingBatch], batch_idx: int) -> Tensor:
        batches = listed(batch)
        # A part takes its step as soon as it has the gradient of all batches.
        done, share = self._descend if len(batches) == 1 else None, 1 / len(batches)
        found: list[list[Terms]] = []
        for group in self.abreast(batches):
            found += [self.learn(group[0], done, share)] if len(group) == 1 else self._learn(group, done, share)
        logged = mean_terms([mean_of(terms) for terms in zip(*found, strict=True)], batches[0].average)
        self._descend(*self.parts.values())  # those that have not, and in sequential mode all
        listed(self.optimizers())[0].step()  # no gradients are left; Lightning counts it as the global step
        for scheduler in listed(self.lr_schedulers()):
            scheduler.step()
        losses = torch.stack([terms["loss"] for terms in logged])
        self.average_steps += 1
        # A plain mean at first, then an exponential moving average.
        self.average_losses.lerp_(losses, max(1 / self.average_steps.item(), 1 - _AVERAGE_DECAY))
        self.log(f"{self.stage_name}/loss", losses.sum(), prog_bar=True, batch_size=len(batches[0].sigmas))
        trainer: Any = self.trainer
        if self.global_step % trainer.log_every_n_steps == 0:  # so many values take a tenth of a tiny model's step
            for name, terms in zip(self.names, logged, strict=True):
                values = {f"{self.stage_name}/{name}/{key}": value for key, value in terms.items()}
                self.log_dict(values, batch_size=len(batches[0].sigmas))
        total = losses.sum()
        infinite = [name for name, loss in zip(self.names, losses.tolist(), strict=True) if not isfinite(loss)]
        self.refuse_infinite(total, int(self.average_steps.item()) - 1, infinite)
        return total

    def _descend(self, *parts: nn.Module) -> None:
        """Take an optimiser step for those of `parts` that have gradients, then free the gradients."""
        ready = [part for part in parts if any(parameter.grad is not None for parameter in part.parameters())]
        if not ready:
            return
        for part in ready:
            self.ready_gradients(part.parameters(), self.config.max_grad_norm)  # part by part: they stay independent
        for optimizer in listed(self.optimizers()):
            optimizer.optimizer.step()
        for part in ready:
            part.zero_grad()

    @torch.no_grad()
    def heldout(self, batches: Iterable[TrainingBatch]) -> list[dict[str, float]]:
        """Return each part's terms averaged over held-out `batches`, numbered as in `names`, without training.

        Inputs are the teacher's activations in every mode, so that sequential and parallel students can be compared.
        """
        sums: list[dict[str, float]] = [{} for _ in self.names]
        count = 0
        for group in self.abreast(batches):
            each: list[list[Terms]] = [[{} for _ in self.names] for _ in group]
            self.each_loss_abreast(group, [found.__setitem__ for found in each])
            for batch, found in zip(group, each, strict=True):
                for total, terms in zip(sums, mean_terms(found, batch.average), strict=True):
                    for key, value in terms.items():
                        total[key] = total.get(key, 0.0) + value.item()
                count += 1
        return [{key: value / count for key, value in terms.items()} for terms in sums]

    def configure_optimizers(self) -> tuple[list, list]:
        optimizers = optimizers_of(self.family, self.parts, list(self.parts.values()), self.config)
        return optimizers, [cosine_schedule(optimizer, self.config) for optimizer in optimizers]

    def rates(self) -> dict[str, float | None]:
        relative = self.config.relative_update
        return {self.relative_key: relative} if relative is not None else {self.lr_key: self.config.lr}
