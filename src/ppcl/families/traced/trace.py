"""Finds out from a running transformer which of its blocks can be pruned in depth, and how they are called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from ppcl.errors import UsageError
from ppcl.families.traced import checks
from ppcl.families.traced.calls import Forward, record
from ppcl.families.traced.feed_forward import FeedForward, feed_forwards
from ppcl.families.traced.masks import find_masks
from ppcl.families.traced.streams import Stream, find_streams
from ppcl.families.traced.structure import BlockList, block_lists

LEAST_SHARE = 0.1  # of the parameters of all blocks
LEAST_BLOCKS = 3  # fewer hold no interval beside a block that stays


@dataclass(frozen=True)
class Stack:
    """A stack of blocks that can be pruned in depth.

    `path`: where it is in the transformer. `key`: the config key that holds its number of blocks. `blocks`: that
    number. `params`: the parameters of all its blocks; `share`: what that is of the transformer's. `streams`: the
    tensors that run from block to block. `first_block`: the first that may be pruned. `last_blocks`: how many at the
    end may not be. Blocks outside of these are built differently, or are used elsewhere, too. `feed_forwards`: modules
    of a block that a linear map could replace.
    """

    path: str
    key: str
    blocks: int
    params: int
    share: float
    streams: tuple[Stream, ...]
    first_block: int = 0
    last_blocks: int = 0
    feed_forwards: tuple[FeedForward, ...] = ()


@dataclass(frozen=True)
class Trace:
    """Result of `trace`: the parts of a transformer that can be pruned.

    `model`: its class. `params`: its number of parameters. `stacks`: those that can be pruned, in order of execution.
    `left_alone`: other block lists, each with the reason.
    """

    model: str
    params: int
    stacks: tuple[Stack, ...]
    left_alone: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.model}, {self.params / 1e6:,.1f}M parameters"]
        for stack in self.stacks:
            lines.append(
                f"  {stack.path}: {stack.blocks} blocks ({stack.key}), {100 * stack.share:.0f}% of the parameters"
            )
            for stream in stack.streams:
                slot = f"output {'.'.join(map(str, stream.slot))}" if stream.slot else "the output"
                mask = f", padding by {stream.mask}" if stream.mask else ""
                lines.append(f"    stream {stream.name}, {stream.tokens} tokens (from {slot}{mask})")
            if stack.first_block or stack.last_blocks:
                end = stack.blocks - stack.last_blocks - 1
                lines.append(f"    blocks {stack.first_block} to {end} are alike, and only these are pruned")
            if stack.feed_forwards:
                lines.append(f"    feed-forward networks: {', '.join(item.name for item in stack.feed_forwards)}")
        lines += [f"  {path}: left alone, {reason}" for path, reason in self.left_alone.items()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the trace as what JSON can hold; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Trace:
        """Return the trace that `to_json` made `content` of; `KeyError` or `TypeError` for anything else."""
        stacks = []
        for stack in content["stacks"]:
            streams = tuple(
                Stream(**(item | {"argument": tuple(item["argument"]), "slot": tuple(item["slot"])}))
                for item in stack["streams"]
            )
            found = tuple(
                FeedForward(**(item | {"streams": tuple(item["streams"])})) for item in stack["feed_forwards"]
            )
            stacks.append(Stack(**(stack | {"streams": streams, "feed_forwards": found})))
        return cls(content["model"], content["params"], tuple(stacks), dict(content["left_alone"]))


def trace(transformer: nn.Module, inputs: Mapping[str, Any], *, least_share: float = LEAST_SHARE) -> Trace:
    """Return which stacks of a transformer can be pruned in depth, and how their blocks are called.

    No model is known by name. Everything is found from the config, and from forwards on `inputs`:

    1. A stack is a list of blocks whose length one integer of the config sets.
    2. Each of its blocks is called once in a forward, in order.
    3. Streams run from block to block: what a block returns is what the next one is given.
    4. Everything else stays the same when a block is taken out, to the bit.
    5. The stock class with one block fewer computes what the model without that block does, to the bit.
    6. A block that is called alone back-propagates.

    `inputs`: keyword arguments of the forward, as the model's own pipeline passes them. Stacks that have less than
    `least_share` of the parameters of all blocks, or fewer than 3 blocks that are alike, are listed and left alone. So
    are lists that no integer counts alone.

    The transformer is left as it was. It runs about six times, and the outputs of all its blocks are held at once.

    Raises `UsageError` with the reason if one of the other stacks fails a check, or if the largest that an integer
    counts is left alone.
    """
    _check_plain(transformer)
    training = transformer.training
    transformer.eval()
    try:
        return _trace(transformer, inputs, least_share)
    finally:
        transformer.train(training)


def _trace(transformer: Any, inputs: Mapping[str, Any], least_share: float) -> Trace:
    name = type(transformer).__name__
    lists = block_lists(transformer)
    left_alone = lists_left_alone(lists, least_share)
    try:
        large = lists_to_prune(lists, left_alone)
    except UsageError as error:
        raise UsageError(f"{name} cannot be traced: {error}.") from None
    paths = [item.path for item in large]
    try:
        forward = record(transformer, inputs, paths)
    except torch.OutOfMemoryError:  # which is no property of the model
        raise
    except Exception as error:  # whatever a model raises on inputs that are not its own
        raise UsageError(f"{name} cannot be traced: it does not run on these inputs ({error}).") from None
    ordered = sorted(large, key=lambda item: _place(forward, item.path))
    try:
        if not checks.finite(forward.output):
            raise UsageError("its output is not finite")
        checks.check_repeats(transformer, inputs, paths, forward)
    except UsageError as error:
        raise UsageError(f"{name} cannot be traced: {error}.") from None
    stacks: list[tuple[BlockList, tuple[Stream, ...]]] = []
    for item in ordered:
        try:
            its_own, streams = _chain(transformer, _pruned(transformer, item, paths, forward, inputs), forward, inputs)
            stacks.append((its_own, _named_apart(item.path, streams, stacks)))
        except UsageError as error:
            raise UsageError(f"{name} cannot be traced: {item.path}: {error}.") from None
    traced = [item.path for item, _ in stacks]
    found: list[Stack] = []
    for item, its_streams in stacks:
        middle = forward.of((item.path, (item.first + item.count - item.last) // 2))
        try:
            checks.check_independent(transformer, inputs, item, traced, forward)
            checks.check_handed_on(item, its_streams, forward)
            checks.check_export(transformer, inputs, item)
            checks.check_learns(transformer, middle, its_streams)
        except UsageError as error:
            raise UsageError(f"{name} cannot be traced: {item.path}: {error}.") from None
        stack = Stack(item.path, str(item.key), item.count, item.params, item.share, its_streams, item.first, item.last)
        found.append(replace(stack, feed_forwards=tuple(feed_forwards(transformer, middle, its_streams))))
    params = sum(parameter.numel() for parameter in transformer.parameters())
    return Trace(name, params, tuple(found), left_alone)


def lists_left_alone(lists: Sequence[BlockList], least_share: float = LEAST_SHARE) -> dict[str, str]:
    """Return the block lists that are left alone, by path, each with the reason."""
    whole = sum(item.params for item in lists if item.key is not None and item.count >= LEAST_BLOCKS)
    found: dict[str, str] = {}
    for item in lists:
        alike = item.count - item.first - item.last
        if item.count < LEAST_BLOCKS:
            found[item.path] = f"it has fewer than {LEAST_BLOCKS} blocks"
        elif item.key is None:
            found[item.path] = item.reason
        elif alike < LEAST_BLOCKS:
            found[item.path] = _too_few(alike)
        elif item.params < least_share * whole:
            found[item.path] = f"it has {100 * item.params / whole:.1f}% of the parameters of all blocks"
    return found


def lists_to_prune(lists: Sequence[BlockList], left_alone: Mapping[str, str]) -> list[BlockList]:
    """Return the other block lists; raises `UsageError` if the largest that a key counts is one that is left alone."""
    if all(item.count < LEAST_BLOCKS for item in lists):
        raise UsageError(f"it has no list of {LEAST_BLOCKS} or more blocks")
    largest = max(lists, key=lambda item: (item.key is not None, item.count >= LEAST_BLOCKS, item.params))
    if largest.path in left_alone:
        raise UsageError(f"{largest.path}: {left_alone[largest.path]}")
    return [item for item in lists if item.path not in left_alone]


def _too_few(alike: int) -> str:
    return f"its blocks are of unequal kinds: at most {alike} in a row are alike and can be taken out"


def _place(forward: Forward, path: str) -> int:
    """Return when the first block of a stack is called."""
    return next((number for number, call in enumerate(forward.calls) if call.key[0] == path), len(forward.calls))


def _pruned(
    transformer: nn.Module, item: BlockList, paths: Sequence[str], forward: Forward, inputs: Mapping[str, Any]
) -> BlockList:
    """Return a list of blocks with those at its beginning and end left out that are also used elsewhere."""
    checks.check_order(item, forward)
    elsewhere = checks.read_elsewhere(transformer, inputs, item, paths, forward)
    inner = [index for index in elsewhere if item.first <= index < item.count - item.last]
    first = max((index + 1 for index in inner if index < item.count // 2), default=item.first)
    stop = min((index for index in inner if index >= item.count // 2), default=item.count - item.last)
    return replace(item, first=first, last=item.count - stop)


def _chain(
    transformer: nn.Module, item: BlockList, forward: Forward, inputs: Mapping[str, Any]
) -> tuple[BlockList, tuple[Stream, ...]]:
    """Return a stack of blocks that are alike and in a chain, and its streams with their masks.

    Raises `UsageError` if there are too few such blocks, or if one called alone returns something else.
    """
    calls = [call for call in forward.calls if call.key[0] == item.path][item.first : item.count - item.last]
    if len(calls) < LEAST_BLOCKS:
        raise UsageError(_too_few(len(calls)))
    streams, first, last = find_streams(calls)
    if not streams or last - first + 1 < LEAST_BLOCKS:
        raise UsageError("what a block returns is not what the next block is given")
    item = replace(item, first=item.first + first, last=item.last + len(calls) - 1 - last)
    middle = calls[(first + last + 1) // 2]
    checks.check_alone(transformer, middle)
    masks = find_masks(transformer, streams, middle, inputs)
    return item, tuple(replace(stream, mask=masks.get(stream.name)) for stream in streams)


def _named_apart(
    path: str, streams: Iterable[Stream], others: Iterable[tuple[BlockList, tuple[Stream, ...]]]
) -> tuple[Stream, ...]:
    """Return the streams of a stack, with another name where an earlier stack has one of that name that is another.

    That is one of other tokens or channels, or with another mask.
    """
    earlier = {stream.name: stream for _, found in others for stream in found}

    def another(stream: Stream) -> bool:
        one = earlier.get(stream.name, stream)
        return (one.tokens, one.channels, one.mask) != (stream.tokens, stream.channels, stream.mask)

    return tuple(
        replace(stream, name=f"{stream.name}_of_{path.replace('.', '_')}") if another(stream) else stream
        for stream in streams
    )


def _check_plain(transformer: Any) -> None:
    """Raise `UsageError` for what is no plain diffusers transformer with floating-point weights."""
    cannot = f"{type(transformer).__name__} cannot be traced"
    if any(hasattr(module, "_orig_mod") for module in transformer.modules()):
        raise UsageError(f"{cannot}: it is compiled; load it again without torch.compile.")
    if not hasattr(transformer, "register_to_config"):
        raise UsageError(f"{cannot}: it is no model of diffusers.")
    quantised = transformer.config.get("quantization_config") is not None
    if quantised or any(not parameter.is_floating_point() for parameter in transformer.parameters()):
        raise UsageError(f"{cannot}: it is quantised; load it in bfloat16.")
    if any(parameter.is_meta for parameter in transformer.parameters()):
        raise UsageError(f"{cannot}: its weights are not loaded.")
