"""ShortGPT: remove the blocks that turn their input least (block influence, arXiv 2403.03853)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity

from ppcl.methods.base import Teacher
from ppcl.methods.removal import Ranking, token_means
from ppcl.taps import BlockKey


def _turn(x: Tensor, y: Tensor) -> Tensor:
    return 1 - cosine_similarity(x, y, dim=-1)


class ShortGpt(Ranking):
    """Ranks blocks by their influence 1 - E[cos(input, output)] and removes those of the lowest first.

    The last block of a stack is never removed, as in TinyFusion's comparison (arXiv 2412.01199).
    """

    reads = (*Ranking.reads, "stream")
    score_name = "block_influence"
    last = 1

    def scores(self, teacher: Teacher) -> dict[BlockKey, float]:
        return token_means(self, teacher, _turn)
