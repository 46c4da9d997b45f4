"""Depth distillation: one student block per interval, trained on the teacher's own activations (paper Eq. 6-7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ppcl.artifacts.plan import Interval, Intervals, plug_name
from ppcl.config import DistillConfig
from ppcl.data.batches import TrainingBatch
from ppcl.distill.local import LocalDistillation
from ppcl.distill.losses import Terms, with_loss
from ppcl.families.base import Family
from ppcl.precision import computing
from ppcl.surgery.depth import student_block
from ppcl.surgery.plugboard import Plugboard
from ppcl.taps import BlockCall, BlockKey, Streams, observe, stack_of
from ppcl.training.sharding import Sharding


class DepthDistillation(LocalDistillation):
    """Trains one student block per interval [u, v] to give the output of teacher block v.

    Loss: the sum over intervals and streams of the losses between the student's output s and the output t of teacher
    block v, weighted by `distill.losses`. The paper's is the mean over valid tokens of ||s/||s|| - t/||t|| ||^2
    (Eq. 6-7). The default is that of ||s - t||^2 / ||t||^2.

    `distill.mode=parallel`: the teacher runs once, without gradient. As soon as it has passed block v, the student of
    [u, v] is called with the arguments that block u was called with. The teacher stops after the last v.

    `distill.mode=sequential` (the paper's ablation): all students are plugged into the model, so that the input of each
    comes from the students before it instead of from the teacher.

    `ready` is called with each student before the next one is built. It moves the student to its device, or shards it,
    so that host memory never holds all of them.
    """

    stage_name, lr_key = "depth", "distill.lr"

    def __init__(
        self,
        family: Family,
        teacher: nn.Module,
        intervals: Intervals,
        config: DistillConfig,
        precision: str = "32-true",
        ready: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        self.pairs = [(stack, pair) for stack in family.stacks for pair in intervals.get(stack, [])]
        students: dict[str, nn.Module] = {}
        for stack, pair in self.pairs:
            student = student_block(list(stack_of(teacher, stack)), pair, config.init)
            if ready is not None:
                ready(student)
            students[plug_name(stack, pair)] = student
        super().__init__(family, teacher, students, config, precision)
        if config.mode == "sequential":
            self._board = (self._plugboard(),)

    def _plugboard(self) -> Plugboard:
        """Return the board that plugs the students into the teacher."""
        intervals: Intervals = {}
        for stack, pair in self.pairs:
            intervals.setdefault(stack, []).append(pair)
        students = {plug_name(stack, pair): self.student(stack, pair) for stack, pair in self.pairs}
        return Plugboard(self.family, self._teacher[0], intervals, students)

    @contextmanager
    def plugged(self) -> Iterator[nn.Module]:
        """Provide the teacher with all students in place of their intervals, within the context."""
        board = self._plugboard()
        try:
            yield board.all().transformer
        finally:
            board()

    def student(self, stack: str, pair: Interval) -> nn.Module:
        return self.parts[self.key(plug_name(stack, pair))]

    @property
    def last(self) -> BlockKey:
        """The last block of the last interval; the teacher's forward stops after it."""
        stack, (_, v) = self.pairs[-1]
        return stack, v

    def shard(self, sharding: Sharding) -> None:
        for student in self.parts.values():
            sharding.unit(student, learns=True)
        super().shard(sharding)

    def _call_student(self, stack: str, pair: Interval, kwargs: dict[str, Any], inputs: Mapping[str, Any]) -> Streams:
        return self.call(stack, self.student(stack, pair), kwargs, inputs)

    def watch(self, batch: TrainingBatch, visit: Callable[[int, Terms], None]) -> Callable[[BlockCall], None]:
        starts = {(stack, pair[0]): number for number, (stack, pair) in enumerate(self.pairs)}
        ends = {(stack, pair[1]): number for number, (stack, pair) in enumerate(self.pairs)}
        masks = self.family.masks(batch.inputs)
        waiting: dict[int, dict[str, Any]] = {}
        gradients = torch.is_grad_enabled()

        def on_block(call: BlockCall) -> None:
            if call.key in starts:
                waiting[starts[call.key]] = call.kwargs
            if call.key in ends:
                number = ends[call.key]
                with torch.set_grad_enabled(gradients):
                    student = self._call_student(*self.pairs[number], waiting.pop(number), batch.inputs)
                    visit(number, with_loss(*self.output_terms(student, call.outputs, masks, batch.average_of)))

        return on_block

    def learn(
        self, batch: TrainingBatch, done: Callable[[nn.Module], None] | None = None, share: float = 1.0
    ) -> list[Terms]:
        if self.config.mode == "parallel":
            return super().learn(batch, done, share)
        return self._sequential_step(batch, share)

    def _sequential_step(self, batch: TrainingBatch, share: float = 1.0) -> list[Terms]:
        """Run the teacher for the targets, then the model with all students, and back-propagate the summed loss."""
        board = self._board[0]
        masks = self.family.masks(batch.inputs)
        ends = {(stack, pair[1]) for stack, pair in self.pairs}
        targets: list[Streams] = []

        def keep_target(call: BlockCall) -> None:
            if call.key in ends:
                targets.append(call.outputs)

        board()
        with torch.no_grad():
            observe(self.family, board.transformer, batch.inputs, keep_target, last=self.last)
        board.all()
        starts = [(stack, board.kept[stack].index(pair[0])) for stack, pair in self.pairs]
        outputs: list[Streams] = []

        def keep_output(call: BlockCall) -> None:
            if call.key in starts:
                outputs.append(call.outputs)

        with computing(self.precision, batch.sigmas.device):
            observe(self.family, board.transformer, batch.inputs, keep_output, last=starts[-1])
        board()
        logged = [
            with_loss(*self.output_terms(student, target, masks, batch.average_of))
            for student, target in zip(outputs, targets, strict=True)
        ]
        self.manual_backward(torch.stack([terms["loss"] for terms in logged]).sum() * share)
        return [{key: value.detach() for key, value in terms.items()} for terms in logged]


class DepthFromBoundaries(DepthDistillation):
    """Depth distillation in parallel mode from activations on disk, without a teacher in memory.

    Batches are `BoundaryBatch`es, whose `parts` follow the order of `intervals`. `students` are by plug name. Each
    interval has files of its own, so a job that trains some of the intervals reads only theirs.
    """

    def __init__(
        self,
        family: Family,
        intervals: Intervals,
        students: dict[str, nn.Module],
        config: DistillConfig,
        precision: str = "32-true",
    ) -> None:
        self.pairs = [(stack, pair) for stack in family.stacks for pair in intervals.get(stack, [])]
        LocalDistillation.__init__(self, family, nn.Identity(), students, config, precision)

    def each_loss_abreast(self, batches: Sequence[Any], visits: Sequence[Callable[[int, Terms], None]]) -> None:
        for batch, visit in zip(batches, visits, strict=True):
            for number, part in enumerate(batch.parts):
                student = self._call_student(*self.pairs[number], part.kwargs, part.inputs)
                visit(number, with_loss(*self.output_terms(student, part.outputs, part.masks, batch.average_of)))
