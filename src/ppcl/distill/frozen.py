"""Finds the parameters of a pruned model that `finetune.trains=after_first_removed` leaves as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import takewhile

from torch import nn

from ppcl.artifacts.plan import Intervals, plug_name
from ppcl.families.base import Family
from ppcl.taps import BlockKey


def before_removal(
    family: Family, model: nn.Module, stands_for: Mapping[BlockKey, BlockKey], students: Collection[str]
) -> list[nn.Parameter]:
    """Return the parameters of `model` that come before its first removed block.

    These are all blocks that run before it, and the embedders: what the model registers before its blocks. The output
    head, which comes after the blocks, is not among them.

    `stands_for`: for each block of `model`, in order of execution, the teacher's block whose output it approximates.
        At least one stands for a later block than itself.
    `students`: the names of the intervals that a student replaces. Block u of an interval [u, v] that is only cut is
        the teacher's, and the first removed block is u + 1. A student is no block of the teacher: block u is removed.
    """
    here, (stack, end) = next(pair for pair in stands_for.items() if pair[0] != pair[1])
    is_student = plug_name(stack, (here[1], end)) in students
    order = [*family.blocks(model)]
    return up_to(family, model, order[: order.index(here) + (not is_student)])


def up_to(family: Family, model: nn.Module, before: Collection[BlockKey]) -> list[nn.Parameter]:
    """Return the parameters of the embedders of `model` and of its blocks `before`."""
    blocks = family.blocks(model)
    inside = {id(parameter) for block in blocks.values() for parameter in block.parameters()}
    embedders = takewhile(lambda parameter: id(parameter) not in inside, model.parameters())
    return [*embedders, *(parameter for key in before for parameter in blocks[key].parameters())]


def num_before(intervals: Intervals, layers: Mapping[str, int], *, students: bool) -> dict[str, int]:
    """Return by stack how many blocks come before the first removed block.

    `layers`: the number of blocks by stack, in order of execution. `students`: whether a student replaces each
        interval, as in `before_removal`; otherwise it is cut.
    """
    found: dict[str, int] = {}
    for stack, count in layers.items():
        pairs = intervals.get(stack)
        found[stack] = pairs[0][0] + (not students) if pairs else count
        if pairs:
            break
    return found
