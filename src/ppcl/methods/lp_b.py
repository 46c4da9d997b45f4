"""Ablation LP-b: PPCL's intervals with their ends moved by one block."""

from __future__ import annotations

from collections.abc import Sequence

from ppcl.artifacts.plan import Interval
from ppcl.config import MethodConfig
from ppcl.errors import UsageError
from ppcl.methods.lp import Lp


def extend_ends(intervals: Sequence[Interval], last: int, which: Sequence[int] | None) -> list[Interval]:
    """Return `intervals` with v moved to v + 1 in those numbered `which`; None means all.

    An interval is left as it is if it ends at `last`, or if the next interval begins right after it and has only two
    blocks. A longer next interval gives up its first block. (The paper prints overlapping intervals, but two that share
    a block cannot both be plugged in.)

    Raises `UsageError` if `which` names an interval that does not exist.
    """
    result = list(intervals)
    numbers = range(len(result)) if which is None else sorted(set(which))
    if numbers and numbers[-1] >= len(result):
        raise UsageError(
            f"method.extend={which} names interval {numbers[-1]}, but detection found only {len(result)} intervals, "
            "numbered from 0: leave that number out."
        )
    for number in numbers:
        u, v = result[number]
        following = result[number + 1] if number + 1 < len(result) else None
        if v + 1 > last:
            continue
        if following is not None and following[0] == v + 1:
            if following[1] - following[0] < 2:
                continue
            result[number + 1] = (following[0] + 1, following[1])
        result[number] = (u, v + 1)
    return result


class LpB(Lp):
    """Extends the intervals that `method.extend` numbers, or all of them, by one block."""

    reads = (*Lp.reads, "extend")

    @classmethod
    def check(cls, config: MethodConfig) -> None:
        super().check(config)
        if config.extend is not None and min(config.extend, default=0) < 0:
            raise UsageError(f"method.extend={config.extend} has a negative number: intervals are numbered from 0.")

    def finished(self, intervals: Sequence[Interval], last: int) -> list[Interval]:
        return extend_ends(intervals, last, self.config.extend)
