"""The paper's baseline: remove the blocks whose single removal changes the model's output least."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ppcl.artifacts.files import check_finite
from ppcl.artifacts.plan import Interval, Intervals
from ppcl.config import MethodConfig
from ppcl.data.batches import TrainingBatch
from ppcl.errors import UsageError
from ppcl.layers import removable
from ppcl.methods.base import Detection, Method, Teacher
from ppcl.ops.cka import centre, cka
from ppcl.taps import BlockKey, replace_stack, stack_of


def runs_to_intervals(removed: list[int]) -> list[Interval]:
    """Return removed blocks as intervals [u, v]: u is the kept block before a run of removed ones, v the run's end."""
    intervals: list[Interval] = []
    for index in sorted(removed):
        if intervals and intervals[-1][1] == index - 1:
            intervals[-1] = (intervals[-1][0], index)
        else:
            intervals.append((index - 1, index))
    return intervals


def _tokens(batch: TrainingBatch, output: Tensor) -> Tensor:
    """Return the prediction in a model's output as `[B, tokens, C]`; pixels of a picture count as tokens."""
    found = batch.prediction(output)
    return found if found.ndim == 3 else found.flatten(2).mT


class CkaSensitivity(Method):
    """Ranks blocks by CKA(output, output without the block) and removes the `method.num_remove` highest.

    The first block of a stack is never removed, because an interval begins with the kept block before it. Neither are
    blocks that the family excludes from pruning, or that `method.start` and `method.end` exclude.
    """

    divides = True

    @classmethod
    def check(cls, config: MethodConfig) -> None:
        if not config.num_remove:
            raise UsageError("method.rule=cka_sensitivity needs method.num_remove, the number of blocks to remove.")

    @torch.no_grad()
    def detect(self, teacher: Teacher) -> Detection:
        sums: dict[BlockKey, float] = {}
        count = 0
        for batch in teacher.progress(teacher.calibration(), self.num_batches):
            full = centre(_tokens(batch, teacher.transformer(**batch.inputs)[0]))
            count += len(full)
            for stack in teacher.family.stacks:
                blocks = stack_of(teacher.transformer, stack)
                for index in range(len(blocks)):
                    similarity = self._without(teacher, stack, blocks, index, batch, full)
                    sums[stack, index] = sums.get((stack, index), 0.0) + similarity
        parts = teacher.gathered((sums, count))
        count = sum(samples for _, samples in parts)
        scores = {key: sum(part[key] for part, _ in parts if part) / count for key in parts[0][0]}
        check_finite(scores, "no block is chosen, since the similarity of the output without one is no number")
        end, facts = self.config.end, teacher.family.facts
        count_of = {stack: len(stack_of(teacher.transformer, stack)) for stack in teacher.family.stacks}
        assert self.config.num_remove is not None, "checked above"
        start = max(facts.first_block, self.config.start)
        candidates = removable(count_of, count=self.config.num_remove, start=start, end=end, last=facts.last_blocks)
        ranked = sorted(candidates, key=lambda key: -scores[key])[: self.config.num_remove]
        intervals: Intervals = {
            stack: runs_to_intervals([index for s, index in ranked if s == stack]) for stack in teacher.family.stacks
        }
        listed = {f"{stack}.{index}": score for (stack, index), score in scores.items()}
        return Detection(intervals, {"cka_without": listed})

    def _without(
        self, teacher: Teacher, stack: str, blocks: nn.ModuleList, index: int, batch: TrainingBatch, full: Tensor
    ) -> float:
        """Return the sum over samples of the CKA between `full` and the output without block `index`."""
        rest = nn.ModuleList([block for i, block in enumerate(blocks) if i != index])
        replace_stack(teacher.transformer, stack, rest)
        try:
            output = centre(_tokens(batch, teacher.transformer(**batch.inputs)[0]))
        finally:
            replace_stack(teacher.transformer, stack, blocks)
        return cka(full, output, debiased=self.config.debiased).sum().item()
