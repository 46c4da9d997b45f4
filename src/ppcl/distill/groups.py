"""Selects the intervals that depth distillation trains, and divides them into groups, trained one after another."""

from __future__ import annotations

from ppcl.artifacts.plan import Intervals, plug_name
from ppcl.errors import UsageError


def select_intervals(intervals: Intervals, names: list[str] | None) -> Intervals:
    """Return the intervals of `intervals` that `names` lists, or all of them if `names` is None.

    A name is `STACK.U-V`, such as `transformer_blocks.3-5`, or `U-V` if only one stack has that interval. Raises
    `UsageError` for a name that does not match exactly one interval.
    """
    if names is None:
        return intervals
    every = {plug_name(stack, pair): (stack, pair) for stack, pairs in intervals.items() for pair in pairs}
    chosen: Intervals = {}
    for name in names:
        matches = [full for full in every if full == name or full.endswith(f".{name}")]
        if len(matches) != 1:
            raise UsageError(f"distill.intervals={name} is not one of this run's intervals: {', '.join(every)}.")
        stack, pair = every[matches[0]]
        chosen.setdefault(stack, []).append(pair)
    return {stack: sorted(pairs) for stack, pairs in chosen.items()}


def divided(intervals: Intervals, groups: int) -> list[Intervals]:
    """Return `intervals` divided into at most `groups` groups of about equal size, in order of execution."""
    every = [(stack, pair) for stack, pairs in intervals.items() for pair in pairs]
    size = -(-len(every) // max(1, groups))
    found: list[Intervals] = []
    for start in range(0, len(every), max(1, size)):
        found.append({})
        for stack, pair in every[start : start + size]:
            found[-1].setdefault(stack, []).append(pair)
    return found
