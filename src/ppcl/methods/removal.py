"""Base classes of methods that remove single blocks: the size to reach, the restrictions, the making of intervals."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ppcl.artifacts.files import check_finite
from ppcl.artifacts.plan import Interval
from ppcl.config import MethodConfig
from ppcl.data.batches import TrainingBatch
from ppcl.errors import UsageError
from ppcl.families.base import Family
from ppcl.layers import removable
from ppcl.methods.base import Detection, Method, Teacher
from ppcl.methods.probes import pairs
from ppcl.surgery.count import block_sizes, on_meta
from ppcl.taps import BlockKey, replace_stack, stack_of

K = TypeVar("K", bound=Hashable)


def runs_to_intervals(removed: Iterable[int]) -> list[Interval]:
    """Return removed blocks as intervals [u, v]: u is the kept block before a run of removed ones, v the run's end."""
    intervals: list[Interval] = []
    for index in sorted(removed):
        if intervals and intervals[-1][1] == index - 1:
            intervals[-1] = (intervals[-1][0], index)
        else:
            intervals.append((index - 1, index))
    return intervals


@dataclass(frozen=True)
class Room:
    """The blocks that may be removed from a model, and how much has to go.

    `blocks`: stack and index of each, in order of execution. Those of one stack are adjacent.
    `sizes`: the parameters of every block of the model. `total`: those of the whole model. Both are empty if
        `method.num_remove` gives the size.
    """

    config: MethodConfig
    blocks: list[BlockKey]
    sizes: Mapping[BlockKey, int]
    total: int

    @classmethod
    def of(
        cls,
        config: MethodConfig,
        family: Family,
        layers: Mapping[str, int],
        transformer: Callable[[], nn.Module],
        *,
        last: int = 0,
    ) -> Room:
        """Return the room that a model has.

        `layers`: its number of blocks by stack. `transformer`: returns it, on any device; called if `method.params` is
        set. `last`: how many blocks at the end of a stack the method never removes.
        """
        sizes, total = ({}, 0) if config.params is None else block_sizes(family, transformer())
        start, last = max(family.facts.first_block, config.start), max(family.facts.last_blocks, last)
        return cls(config, removable(layers, start=start, end=config.end, last=last), sizes, total)

    @property
    def by_stack(self) -> dict[str, list[int]]:
        """The indices of the blocks that may be removed, by stack. In each stack they are adjacent."""
        found: dict[str, list[int]] = {}
        for stack, index in self.blocks:
            found.setdefault(stack, []).append(index)
        return found

    def left(self, removed: Iterable[BlockKey]) -> int:
        """Return how many parameters are left without the blocks `removed`."""
        return self.total - sum(self.sizes.get(key, 0) for key in removed)

    def enough(self, removed: Collection[BlockKey]) -> bool:
        """Return whether the size is reached without the blocks `removed`."""
        params = self.config.params
        if params is None:
            return len(removed) >= (self.config.num_remove or 0)
        return self.left(removed) <= (params * self.total if params <= 1 else params)

    def first_enough(self, order: Iterable[BlockKey]) -> list[BlockKey]:
        """Return the first blocks of `order`, as many as it takes to reach the size."""
        removed: list[BlockKey] = []
        for key in order:
            if self.enough(removed):
                break
            removed.append(key)
        return removed

    def check(self, most: Collection[BlockKey], what: str) -> None:
        """Raise `UsageError` if the size is not reached without the blocks `most`, or if it is reached with all.

        `most`: the most that the method can remove. `what`: these blocks in words.
        """
        count, params = self.config.num_remove, self.config.params
        if params is None:
            if count is not None and count > len(most):
                raise UsageError(f"method.num_remove={count} exceeds the {len(most)} {what}: give at most that many.")
            return
        if self.enough([]):
            raise UsageError(
                f"method.params={params:g} removes nothing from a model of {self.total:,} parameters: give a share "
                "below 1, or a smaller number."
            )
        if not self.enough(most):
            left = self.left(most)
            share = ceil(1000 * left / self.total) / 1000
            raise UsageError(
                f"method.params={params:g} cannot be reached: without the {len(most)} {what} the model still has "
                f"{left:,} of its {self.total:,} parameters, so give at least {share:g}."
            )


def check_size(config: MethodConfig) -> None:
    """Raise `UsageError` unless exactly one of `method.num_remove` and `method.params` is given."""
    count, params = config.num_remove, config.params
    if count is None and params is None:
        raise UsageError(
            f"method.rule={config.rule} needs a size: give method.num_remove, the number of blocks to remove, or "
            "method.params, the share of the parameters that may be left."
        )
    if count is not None and params is not None:
        raise UsageError(
            f"method.num_remove={count} and method.params={params:g} are both set, and only one can be the size: "
            "add method.params=null or method.num_remove=null."
        )


class Removal(Method):
    """A method that removes single blocks until the model is as small as `method.num_remove` or `method.params` says.

    The first block of a stack is never removed, because an interval begins with the kept block before it. Neither are
    blocks that the family excludes from pruning, or that `method.start` and `method.end` exclude.

    `last`: how many blocks at the end of a stack the method never removes.
    `most_what`: the most blocks that it can remove, in words.
    """

    reads: ClassVar[tuple[str, ...]] = ("start", "end", "num_remove", "params")
    last: ClassVar[int] = 0
    most_what: str = "blocks that may be removed"

    @classmethod
    def check(cls, config: MethodConfig) -> None:
        check_size(config)

    def check_model(self, family: Family, layers: Mapping[str, int]) -> None:
        room = Room.of(self.config, family, layers, lambda: on_meta(family, family.arch), last=self.last)
        room.check(self.most(room), self.most_what)

    def detect(self, teacher: Teacher) -> Detection:
        layers = {stack: len(stack_of(teacher.transformer, stack)) for stack in teacher.family.stacks}
        room = Room.of(self.config, teacher.family, layers, lambda: teacher.transformer, last=self.last)
        room.check(self.most(room), self.most_what)
        removed, scores = self.removed(teacher, room)
        return Detection({stack: runs_to_intervals(i for s, i in removed if s == stack) for stack in layers}, scores)

    def most(self, room: Room) -> list[BlockKey]:
        """Return the blocks that are removed if the method removes as much as it can."""
        return room.blocks

    @abstractmethod
    def removed(self, teacher: Teacher, room: Room) -> tuple[list[BlockKey], dict[str, Any]]:
        """Return the blocks to remove, and the scores to save in the plan."""


class Ranking(Removal):
    """A method that scores each block alone and removes the blocks of least importance first.

    `score_name`: the name of the scores in the plan. `highest_first`: whether a high score means little importance.
    """

    divides = True
    score_name: ClassVar[str]
    highest_first: ClassVar[bool] = False

    @abstractmethod
    def scores(self, teacher: Teacher) -> dict[BlockKey, float]:
        """Return the score of every block, the same on every rank."""

    def removed(self, teacher: Teacher, room: Room) -> tuple[list[BlockKey], dict[str, Any]]:
        scores = self.scores(teacher)
        named = {f"{stack}.{index}": score for (stack, index), score in scores.items()}
        check_finite(named, f"no block is chosen, since the {self.score_name} of a block is no number")
        sign = -1 if self.highest_first else 1
        return room.first_enough(sorted(room.blocks, key=lambda key: sign * scores[key])), {self.score_name: named}


class Pattern(Removal):
    """A method that removes blocks by their place alone.

    Every stack loses the same share of the blocks that it may lose, rounded to whole blocks.
    """

    @abstractmethod
    def places(self, blocks: Sequence[int], count: int) -> list[int]:
        """Return the `count` blocks to remove from a stack. `blocks`: the adjacent ones that it may lose."""

    def removed(self, teacher: Teacher, room: Room) -> tuple[list[BlockKey], dict[str, Any]]:
        for count in range(1, len(room.blocks) + 1):
            shares = proportional(count, {stack: len(blocks) for stack, blocks in room.by_stack.items()})
            found = [
                (stack, index)
                for stack, blocks in room.by_stack.items()
                for index in self.places(blocks, shares[stack])
            ]
            if room.enough(found):
                return found, {}
        raise AssertionError("checked before: all blocks that may be removed are enough")


def proportional(count: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Divide `count` among the keys of `sizes` in proportion to these, and give what is left to the largest remainders.

    `count` is at most the sum of `sizes`. Of equal remainders the first one counts.
    """
    total = sum(sizes.values())
    shares = {key: count * size // total for key, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda key: -(count * sizes[key] % total))
    for key in by_remainder[: count - sum(shares.values())]:
        shares[key] += 1
    return shares


def added_up(teacher: Teacher, sums: Mapping[K, Any]) -> dict[K, Any]:
    """Return the sums of all ranks, each of which has summed over its own batches and may lack keys."""
    found: dict[K, Any] = {}
    for part in teacher.gathered(dict(sums)):
        for key, value in part.items():
            found[key] = found[key] + value if key in found else value
    return found


@torch.no_grad()
def token_means(method: Method, teacher: Teacher, measure: Callable[[Tensor, Tensor], Tensor]) -> dict[BlockKey, float]:
    """Return the mean of `measure` over all valid tokens of the calibration, for every block.

    It is that of the stream `method.stream`. For `mean`, or in a block without that stream, it is the mean over the
    block's streams.

    `measure(x, y)`: a number per token `[T]`, from a block's input and output tokens `[T, D]` in float32.
    """
    sums: dict[str, Tensor] = {}
    for batch in teacher.progress(teacher.calibration(), method.num_batches):
        for _, name, moved in pairs(teacher.family, teacher.transformer, [batch]):
            for x, dx in moved:
                values = measure(x, x + dx).double()
                added = torch.stack([values.sum(), values.new_tensor(len(values))])
                sums[name] = sums[name] + added if name in sums else added
    means: dict[BlockKey, dict[str, float]] = {}
    for name, added in added_up(teacher, {name: value.cpu() for name, value in sums.items()}).items():
        stack, index, stream = name.rsplit(".", 2)
        total, count = added.tolist()
        means.setdefault((stack, int(index)), {})[stream] = total / count
    return {
        key: streams.get(method.config.stream, sum(streams.values()) / len(streams)) for key, streams in means.items()
    }


def predicted_tokens(batch: TrainingBatch, output: Any) -> Tensor:
    """Return the prediction in what a model returns as `[B, tokens, C]`; pixels of a picture count as tokens.

    All that a model of several outputs predicts is one token.
    """
    found = batch.prediction(output)
    if found.ndim == 2:
        return found.unsqueeze(1)
    return found if found.ndim == 3 else found.flatten(2).mT


@contextmanager
def without(transformer: nn.Module, removed: Collection[BlockKey]) -> Iterator[None]:
    """Run the model without the blocks `removed` within the context."""
    whole = {stack: stack_of(transformer, stack) for stack, _ in removed}
    try:
        for stack, blocks in whole.items():
            rest = nn.ModuleList([block for i, block in enumerate(blocks) if (stack, i) not in removed])
            replace_stack(transformer, stack, rest)
        yield
    finally:
        for stack, blocks in whole.items():
            replace_stack(transformer, stack, blocks)


def _without_each(teacher: Teacher, batch: TrainingBatch) -> Iterator[tuple[BlockKey, Tensor]]:
    """Yield every block and what the teacher predicts without it, `[B, tokens, C]`."""
    for stack in teacher.family.stacks:
        for index in range(len(stack_of(teacher.transformer, stack))):
            with without(teacher.transformer, [(stack, index)]):
                output = teacher.transformer(**batch.inputs)
            yield (stack, index), predicted_tokens(batch, output)


@torch.no_grad()
def removal_means(
    method: Method, teacher: Teacher, compare: Callable[[Tensor, Tensor], Tensor]
) -> dict[BlockKey, float]:
    """Return for every block how the teacher's prediction without it compares with the whole teacher's.

    `compare(whole, without)`: a number per sample `[B]`, from two predictions `[B, tokens, C]`. The mean over the
    samples of the calibration is returned.
    """
    sums: dict[BlockKey, float] = {}
    count = 0
    for batch in teacher.progress(teacher.calibration(), method.num_batches):
        whole = predicted_tokens(batch, teacher.transformer(**batch.inputs))
        count += len(whole)
        for key, without in _without_each(teacher, batch):
            sums[key] = sums.get(key, 0.0) + compare(whole, without).sum().item()
    count = sum(teacher.gathered(count))
    return {key: value / count for key, value in added_up(teacher, sums).items()}
