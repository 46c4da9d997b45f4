"""Finds the feed-forward networks of a block, which a linear map could replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.families.traced.calls import Call
from ppcl.families.traced.leaves import at, same
from ppcl.families.traced.streams import Stream, tokens_of
from ppcl.taps import stack_of

LEAST_SHARE = 0.2  # of a block's parameters


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network of a block.

    `name`: that of the module within the block. `dim`: the channels of what it takes and returns. `streams`: the
    streams of the block's output that change with what it returns.
    """

    name: str
    dim: int
    streams: tuple[str, ...]


@torch.no_grad()
def feed_forwards(transformer: nn.Module, call: Call, streams: Sequence[Stream]) -> list[FeedForward]:
    """Return the feed-forward networks of a block, in the order of its modules, the outermost of nested ones.

    Each takes one tensor, returns one of the same shape, works on each token by itself, and holds a fifth of the
    block's parameters or more.
    """
    block = stack_of(transformer, call.key[0])[call.key[1]]
    whole = sum(parameter.numel() for parameter in block.parameters())
    seen: dict[str, list[tuple[tuple, dict, object]]] = {}
    handles = []
    for name, module in block.named_modules():
        if name and sum(parameter.numel() for parameter in module.parameters()) >= LEAST_SHARE * whole:

            def note(module: nn.Module, args: tuple, kwargs: dict, output: object, name: str = name) -> None:
                seen.setdefault(name, []).append((args, kwargs, output))

            handles.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        block(**call.arguments)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, FeedForward] = {}
    for name, module in block.named_modules():
        if name not in seen or any(name.startswith(f"{outer}.") for outer in found) or isinstance(module, nn.Linear):
            continue
        if all(_one_for_one(*item) and _by_token(module, *item[:2]) for item in seen[name]):
            output: Any = seen[name][0][2]
            found[name] = FeedForward(name, output.shape[-1], _changed(block, module, output, call, streams))
    return list(found.values())


def _changed(
    block: nn.Module, module: nn.Module, output: Tensor, call: Call, streams: Sequence[Stream]
) -> tuple[str, ...]:
    """Return the streams of a block's output that change when one of its modules returns something else.

    If none changes, because the gates of an untrained model are 0, they are those with as many tokens as `output`.
    """
    handle = module.register_forward_hook(lambda module, args, output: output * 2 + 1)
    try:
        other = block(**call.arguments)
    finally:
        handle.remove()
    changed = [stream for stream in streams if not same(at(call.output, stream.slot), at(other, stream.slot))]
    shape = tokens_of(output).shape[:2]
    alike = [stream for stream in streams if tokens_of(at(call.output, stream.slot)).shape[:2] == shape]
    return tuple(stream.name for stream in changed or alike or streams)


def _one_for_one(args: tuple, kwargs: dict, output: object) -> bool:
    """Return whether a call took one tensor and nothing else, and returned one of the same shape."""
    given = [value for value in (*args, *kwargs.values()) if value is not None]
    if len(given) != 1 or not isinstance(given[0], Tensor) or not isinstance(output, Tensor):
        return False
    return output.shape == given[0].shape


def _by_token(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Return whether a module's output for each token depends on that token alone.

    All dimensions but the last are tokens: some models have those of one sample in the first, others in the second.
    """
    given = next(value for value in (*args, *kwargs.values()) if value is not None)
    if given.ndim < 2 or given[..., 0].numel() < 2:
        return False
    changed = given.flatten(0, -2).clone()
    changed[0] = changed[0] * 2 + 1

    def call(value: Tensor) -> Tensor:
        swapped = tuple(value if item is given else item for item in args)
        result: Tensor = module(*swapped, **{key: value if item is given else item for key, item in kwargs.items()})
        return result

    before, after = (call(value).flatten(0, -2) for value in (given, changed.view_as(given)))
    rest = torch.allclose(before[1:], after[1:], rtol=1e-3, atol=1e-5)
    return rest and not torch.equal(before[0], after[0])
