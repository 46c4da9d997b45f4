"""Uniform removal: remove blocks at even distances, as a baseline without calibration."""

from __future__ import annotations

from collections.abc import Sequence

from ppcl.methods.removal import Pattern


class Uniform(Pattern):
    """Removes evenly spaced blocks of each stack."""

    def places(self, blocks: Sequence[int], count: int) -> list[int]:
        return [blocks[(2 * number + 1) * len(blocks) // (2 * count)] for number in range(count)]
