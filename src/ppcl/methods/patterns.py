"""Groups of adjacent blocks of which some stay: the patterns N:M. Importing this loads no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb
from typing import Any

from ppcl.artifacts.plan import plug_name
from ppcl.errors import UsageError

BlockKey = tuple[str, int]  # stack and index
_KEY = "method.settings.groups"
_FORM = 'write a list such as [[2,4],[3,4]], or "2:4" for groups of one kind, each with the blocks to keep first'
_SIZE = 4  # blocks in a group that nothing else is said about
_MOST_CHOICES = 100_000  # of a group; 7 of 14 blocks can be kept in 3,432 ways


@dataclass(frozen=True)
class Group:
    """Adjacent blocks of a stack, of which `keep` stay.

    `blocks`: their indices. `free`: those that may be removed.
    """

    stack: str
    blocks: range
    keep: int
    free: tuple[int, ...]

    @property
    def name(self) -> str:
        """Its name in files and logs, such as `transformer_blocks.4-7`."""
        return plug_name(self.stack, (self.blocks[0], self.blocks[-1]))

    @property
    def num_removed(self) -> int:
        """How many of its blocks go."""
        return len(self.blocks) - self.keep

    @property
    def num_choices(self) -> int:
        """In how many ways they can be chosen."""
        return comb(len(self.free), self.num_removed)

    def choices(self) -> list[tuple[int, ...]]:
        """Return every choice of blocks to remove, by their indices."""
        return list(combinations(self.free, self.num_removed))


def groups_of(given: Any, layers: Mapping[str, int], free: Sequence[BlockKey]) -> list[Group]:
    """Return the groups that `method.settings.groups` gives, of all stacks in order of execution.

    `layers`: the number of blocks by stack. `free`: the blocks that may be removed. Raises `UsageError` for groups that
    do not fit the model.
    """
    found = _patterns(given, layers)
    groups = [group for stack, pairs in found.items() for group in _in_order(stack, pairs, layers[stack], free)]
    for group in groups:
        _check(group)
    if not any(group.num_removed for group in groups):
        raise UsageError(f"{_KEY}={given} keeps every block: give a group [N, M] with N below M.")
    return groups


def _patterns(given: Any, layers: Mapping[str, int]) -> dict[str, list[tuple[int, int]]]:
    """Return the pairs (N, M) of each stack that `method.settings.groups` names, in the order of stacks."""
    stacks = [stack for stack, count in layers.items() if count]
    if isinstance(given, Mapping):
        for stack in given:
            if stack not in stacks:
                raise UsageError(f"{_KEY}.{stack}: the model has no block stack {stack} (it has {', '.join(stacks)}).")
        return {stack: _pairs(f"{_KEY}.{stack}", given[stack], layers[stack]) for stack in stacks if stack in given}
    if not isinstance(given, str) and len(stacks) > 1:
        raise UsageError(
            f"{_KEY}={given} does not say which stack it is for: give a list for each of {', '.join(stacks)}, such as "
            f'{{{stacks[0]}: "2:4"}}.'
        )
    return {stack: _pairs(_KEY, given, layers[stack]) for stack in stacks}


def _pairs(key: str, given: Any, count: int) -> list[tuple[int, int]]:
    """Return the pairs (N, M) of a stack with `count` blocks; `UsageError` if they are none, or do not add up."""
    kind = re.fullmatch(r"(\d+):(\d+)", given) if isinstance(given, str) else None
    if kind is not None:
        pair = int(kind[1]), int(kind[2])
        pairs = [pair] * max(1, count // max(1, pair[1]))
    elif isinstance(given, Sequence) and not isinstance(given, str) and given and all(map(_is_pair, given)):
        pairs = [(keep, size) for keep, size in given]
    else:
        raise UsageError(f"{key}={given} is no pattern of groups: {_FORM}.")
    for keep, size in pairs:
        if not 1 <= keep <= size:
            raise UsageError(
                f"{key}: the group [{keep}, {size}] keeps {keep} of {size} blocks; give [N, M] with N from 1 to M."
            )
    total = sum(size for _, size in pairs)
    if total != count:
        raise UsageError(
            f"{key}={given} makes groups of {total} blocks together, and the model has {count} there: give groups that "
            "add up to them."
        )
    return pairs


def _is_pair(item: Any) -> bool:
    return isinstance(item, Sequence) and len(item) == 2 and all(type(number) is int for number in item)


def _in_order(stack: str, pairs: Iterable[tuple[int, int]], count: int, free: Sequence[BlockKey]) -> Iterable[Group]:
    """Yield groups of a stack, one after another from its first block."""
    begin = 0
    for keep, size in pairs:
        blocks = range(begin, begin + size)
        yield Group(stack, blocks, keep, tuple(index for s, index in free if s == stack and index in blocks))
        begin += size


def spread(count: int, layers: Mapping[str, int], free: Sequence[BlockKey]) -> list[Group]:
    """Return groups of about four blocks, which lose `count` blocks together, spread evenly over those that may go.

    A group loses at most all but one. Groups that cannot lose so many lose as many as they can.
    """
    cut = {stack: _divided(number) for stack, number in layers.items() if number}
    whole = [group for stack, pairs in cut.items() for group in _in_order(stack, pairs, layers[stack], free)]
    room = [min(len(group.free), len(group.blocks) - 1) for group in whole]
    count = min(count, sum(room))
    groups, before = [], 0
    for group, places in zip(whole, room, strict=True):
        removed = _share(count, before + places, sum(room)) - _share(count, before, sum(room))
        groups.append(Group(group.stack, group.blocks, len(group.blocks) - removed, group.free))
        before += places
    return groups


def _divided(count: int) -> list[tuple[int, int]]:
    """Return (M, M) for groups of about four blocks that make up `count`, which remove nothing yet."""
    parts = max(1, round(count / _SIZE))
    ends = [_share(count, number, parts) for number in range(parts + 1)]
    return [(end - begin, end - begin) for begin, end in pairwise(ends)]


def _share(count: int, part: int, whole: int) -> int:
    """Return the part / whole of `count`, rounded to the nearest number."""
    return (2 * count * part + whole) // (2 * whole)


def _check(group: Group) -> None:
    """Raise `UsageError` unless the blocks of a group can be chosen."""
    if group.num_removed > len(group.free):
        raise UsageError(
            f"{_KEY}: {group.name} is to lose {group.num_removed} blocks, and {len(group.free)} of them may go: "
            "the first block of a stack stays, and so do those that the family or method.start and method.end exclude; "
            "let this group keep more."
        )
    if group.num_choices > _MOST_CHOICES:
        raise UsageError(
            f"{_KEY}: {group.name} keeps {group.keep} of {len(group.blocks)} blocks, which can be chosen in "
            f"{group.num_choices:,} ways, and {_MOST_CHOICES:,} can be learned: divide it into smaller groups."
        )
