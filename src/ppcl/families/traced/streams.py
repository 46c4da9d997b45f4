"""Finds the streams of a stack: the tensors that each block returns and the next block is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ppcl.families.traced.calls import Call
from ppcl.families.traced.leaves import Path, tensors


@dataclass(frozen=True)
class Stream:
    """A tensor that runs from block to block.

    `name`: that of the argument that takes it, and if a stream of another stack has the same with other tokens, also
    that of the stack. `argument`: its place in the arguments; longer than one if the argument is a list or a dict.
    `slot`: its place in what a block returns; empty if a block returns that tensor alone. `tokens`, `channels`:
    its size in the traced forward. `mask`: the argument of the transformer's forward that marks its valid tokens,
    boolean or 0 and 1, `[B, tokens]`; None if all are valid.
    """

    name: str
    argument: Path
    slot: Path
    tokens: int = 0
    channels: int = 0
    mask: str | None = None


def find_streams(calls: Sequence[Call]) -> tuple[list[Stream], int, int]:
    """Return the streams of the calls of one stack's blocks, without masks, and the first and the last such block.

    They are found by identity: a tensor that block k returns is an argument of block k + 1, by the same places for all
    k. What every block returns as it was given is no stream. If something is computed between two blocks, the streams
    are those of the longest run of blocks without that.
    """
    handed = [_handed_on(here, following) for here, following in pairwise(calls)]
    best: tuple[set[tuple[Path, Path]], int, int] = (set(), 0, 0)
    for start in range(len(handed)):
        found, stop = handed[start], start + 1
        while stop < len(handed) and found & handed[stop]:
            found, stop = found & handed[stop], stop + 1
        if found and stop - start > best[2] - best[1]:
            best = found, start, stop
    pairs, first, last = best
    streams: list[Stream] = []
    for slot, place in sorted(pairs, key=str):
        if any(place == stream.argument or slot == stream.slot for stream in streams):
            continue
        if all(_passed_on(call, slot) for call in calls[first:last]):
            continue
        _, tokens, channels = tokens_of(tensors(calls[last].arguments)[place]).shape
        streams.append(Stream("_".join(map(str, place)), place, slot, tokens, channels))
    return streams, first, last


def _handed_on(here: Call, following: Call) -> set[tuple[Path, Path]]:
    """Return which outputs of a block are arguments of the next, by their places."""
    given = tensors(following.arguments)
    return {
        (slot, place)
        for slot, value in tensors(here.output).items()
        for place, argument in given.items()
        if value is argument and value.is_floating_point() and value.ndim > 1
    }


def _passed_on(call: Call, slot: Path) -> bool:
    """Return whether a block returned a tensor that it was given, unchanged."""
    value = tensors(call.output).get(slot)
    return any(value is argument for argument in tensors(call.arguments).values())


def tokens_of(stream: Tensor) -> Tensor:
    """Return a stream as `[B, tokens, D]`.

    A stream without a batch, `[tokens, D]`, is a batch of one. Of more dimensions all but the first and the last are
    tokens.
    """
    if stream.ndim == 2:
        return stream[None]
    return stream.flatten(1, -2)
