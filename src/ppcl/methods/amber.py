"""Amber-Image: replace clusters of adjacent blocks whose outputs are alike by one block each (arXiv 2602.17047)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from ppcl.artifacts.plan import Interval, plug_name
from ppcl.methods.base import Teacher
from ppcl.methods.removal import Removal, Room
from ppcl.methods.windows import mean_cosines
from ppcl.options import option
from ppcl.taps import BlockKey


@dataclass
class Settings:
    """`max_length`: the most blocks in a cluster. None: no limit."""

    max_length: int | None = option(None, least=2)


class Amber(Removal):
    """Merges the two adjacent clusters whose outputs are most alike, until the model is small enough.

    Every block begins as a cluster of its own. Two clusters are as alike as the mean cosine between an output of a
    block in one and an output of a block in the other. Each cluster of several blocks becomes an interval.
    """

    settings_class = Settings
    reads = (*Removal.reads, "stream")
    divides = True
    compares_states = True
    most_what = "blocks that clusters of at most method.settings.max_length blocks may lose"

    def most(self, room: Room) -> list[BlockKey]:
        longest = self.settings.max_length
        return [
            (stack, index)
            for stack, blocks in room.by_stack.items()
            for place, index in enumerate(blocks, start=1)  # 0 is the block before them, which stays
            if longest is None or place % longest
        ]

    def removed(self, teacher: Teacher, room: Room) -> tuple[list[BlockKey], dict[str, Any]]:
        cosines = mean_cosines(self, teacher)
        clusters = {
            stack: [(index, index) for index in range(blocks[0] - 1, blocks[-1] + 1)]
            for stack, blocks in room.by_stack.items()
        }
        removed: list[BlockKey] = []
        merged: dict[str, float] = {}
        while not room.enough(removed):
            found = self._most_alike(clusters, cosines)
            if found is None:
                room.check(removed, "blocks that clusters lost before no two fitted into method.settings.max_length")
            assert found is not None, "it has raised"
            score, stack, place = found
            (u, _), (first, v) = clusters[stack][place : place + 2]
            clusters[stack][place : place + 2] = [(u, v)]
            removed.append((stack, first))
            merged[plug_name(stack, (u, v))] = score
        return removed, {"cluster_cosine": merged}

    def _most_alike(
        self, clusters: Mapping[str, list[Interval]], cosines: Mapping[str, Tensor]
    ) -> tuple[float, str, int] | None:
        """Return the cosine of the two adjacent clusters that are most alike, their stack, and the place of the first.

        Returns None if no two may be merged. Of equal ones it takes the first.
        """
        best: tuple[float, str, int] | None = None
        for stack, found in clusters.items():
            for place, ((u, v), (first, last)) in enumerate(pairwise(found)):
                if self.settings.max_length is not None and last - u + 1 > self.settings.max_length:
                    continue
                # The output of block i is state i + 1.
                score = cosines[stack][u + 1 : v + 2, first + 1 : last + 2].mean().item()
                if best is None or score > best[0]:
                    best = (score, stack, place)
        return best
