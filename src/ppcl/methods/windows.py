"""Base class of methods that choose a run of adjacent blocks, by how alike the states before and after it are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from ppcl.artifacts.files import check_finite
from ppcl.artifacts.plan import Interval, plug_name
from ppcl.methods.base import Method, Teacher
from ppcl.methods.removal import Removal, Room, added_up
from ppcl.methods.similarity import state_cosines
from ppcl.taps import BlockKey


def mean_cosines(method: Method, teacher: Teacher) -> dict[str, Tensor]:
    """Return by stack the mean cosine of every pair of states over the calibration, `[M + 1, M + 1]` of M blocks.

    State i is the input of block i, and so the output of block i - 1. The stream is `method.stream`. For `mean`, or
    for states without that stream, it is the mean over the streams that both states have.
    """
    sums: dict[tuple[str, str], Tensor] = {}
    for batch in teacher.progress(teacher.calibration(), method.num_batches):
        for key, table in state_cosines(teacher.family, teacher.transformer, batch).items():
            sums[key] = sums[key] + table if key in sums else table
    streams: dict[str, dict[str, Tensor]] = {}
    for (stack, stream), (total, count) in added_up(teacher, {key: table.cpu() for key, table in sums.items()}).items():
        check_finite(total.sum().item(), "no block is chosen", f"the cosine of the {stream} stream in {stack}")
        streams.setdefault(stack, {})[stream] = total / count  # NaN where a state lacks the stream
    found = {}
    for stack, tables in streams.items():
        every = torch.stack([*tables.values()]).nanmean(dim=0)
        chosen = tables.get(method.config.stream, every)
        found[stack] = torch.where(chosen.isnan(), every, chosen)
    return found


class Window(Removal):
    """A method that replaces one run of adjacent blocks, the window [u, v], by one block.

    Of each beginning u it takes the shortest window that makes the model small enough, and of these windows the one
    whose two ends are most alike by their mean cosine. The window lies within one stack.

    `skipped`: 0 to compare the window's output with the input of block u, 1 with its output.
    """

    reads = (*Removal.reads, "stream")
    divides = True
    compares_states = True
    most_what = "blocks that one window in one stack may lose"
    skipped: ClassVar[int]

    def most(self, room: Room) -> list[BlockKey]:
        stacks = [[(stack, index) for index in blocks] for stack, blocks in room.by_stack.items()]
        return min(stacks, key=lambda blocks: (room.left(blocks), -len(blocks)), default=[])

    def removed(self, teacher: Teacher, room: Room) -> tuple[list[BlockKey], dict[str, Any]]:
        cosines = mean_cosines(self, teacher)
        scores = {
            (stack, window): cosines[stack][window[0] + self.skipped, window[1] + 1].item()
            for stack, window in _windows(room)
        }
        stack, (u, v) = max(scores, key=lambda key: scores[key])
        named = {plug_name(*key): score for key, score in scores.items()}
        return [(stack, index) for index in range(u + 1, v + 1)], {"window_cosine": named}


def _windows(room: Room) -> Iterator[tuple[str, Interval]]:
    """Yield the shortest window [u, v] from each u that makes the model small enough, with its stack."""
    for stack, blocks in room.by_stack.items():
        for first in blocks:
            removed = room.first_enough((stack, index) for index in range(first, blocks[-1] + 1))
            if room.enough(removed):
                yield stack, (first - 1, first - 1 + len(removed))
