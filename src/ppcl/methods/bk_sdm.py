"""BK-SDM's scheme: keep the first block of each group in the first half of a model, the last in the second half."""

from __future__ import annotations

from collections.abc import Sequence

from ppcl.methods.removal import Pattern


def kept_by_scheme(num_blocks: int, count: int) -> list[int]:
    """Return the blocks that are kept when `count` of `num_blocks` are removed.

    The first half is taken as the encoder, the second as the decoder, and each is divided into groups of equal size,
    up to one block. An encoder's group keeps its first block and a decoder's its last. Of an odd number of blocks, or
    of kept blocks, the encoder has one more.
    """
    kept = num_blocks - count
    encoder, decoder = -(-num_blocks // 2), num_blocks // 2
    first, last = -(-kept // 2), kept // 2
    return [
        *(group * encoder // first for group in range(first)),
        *reversed([num_blocks - 1 - group * decoder // last for group in range(last)]),
    ]


class BkSdm(Pattern):
    """Removes blocks by the scheme of BK-SDM (arXiv 2305.15798), as TinyFusion applies it to transformers.

    Each stack is a model of its own: its block before the first that may be removed, and those that may be removed.
    """

    def places(self, blocks: Sequence[int], count: int) -> list[int]:
        kept = {blocks[0] - 1 + place for place in kept_by_scheme(len(blocks) + 1, count)}
        return [index for index in blocks if index not in kept]
