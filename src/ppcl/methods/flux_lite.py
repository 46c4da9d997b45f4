"""FLUX.1-lite: remove the blocks whose output is nearest to their input."""

from __future__ import annotations

from torch import Tensor

from ppcl.methods.base import Teacher
from ppcl.methods.removal import Ranking, token_means
from ppcl.taps import BlockKey


def _squared_error(x: Tensor, y: Tensor) -> Tensor:
    return (y - x).square().mean(dim=-1)


class FluxLite(Ranking):
    """Ranks blocks by the mean squared error between their input and output and removes those of the lowest first."""

    reads = (*Ranking.reads, "stream")
    score_name = "mse"

    def scores(self, teacher: Teacher) -> dict[BlockKey, float]:
        return token_means(self, teacher, _squared_error)
