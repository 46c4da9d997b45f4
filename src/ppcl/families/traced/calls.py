"""Records the calls of all blocks in one forward of a transformer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ppcl.families.traced.leaves import Path, tensors
from ppcl.taps import BlockKey, by_name, stack_of


@dataclass
class Call:
    """One call of a block: its arguments by name, and what it returned."""

    key: BlockKey
    arguments: dict[str, Any]
    output: Any
    # How often each tensor had been changed in place, when the call began and when it ended.
    given: dict[Path, int] = field(default_factory=dict)
    returned: dict[Path, int] = field(default_factory=dict)

    def changed(self) -> str | None:
        """Return what was changed in place after it was given or returned, or None."""
        if versions(self.arguments) != self.given:
            return "what it is given"
        if versions(self.output) != self.returned:
            return "what it returns"
        return None


def versions(value: Any) -> dict[Path, int]:
    """Return how often each tensor in nested values has been changed in place."""
    return {place: tensor._version for place, tensor in tensors(value).items()}


@dataclass
class Forward:
    """One forward of a transformer: the calls of its blocks in order of execution, and its output."""

    calls: list[Call]
    output: Any

    def of(self, key: BlockKey) -> Call:
        return next(call for call in self.calls if call.key == key)


@torch.no_grad()
def record(transformer: nn.Module, inputs: Mapping[str, Any], stacks: Sequence[str]) -> Forward:
    """Run the transformer on `inputs` and record the calls of all blocks of `stacks`."""
    calls: list[Call] = []
    with ExitStack() as hooks:
        for stack in stacks:
            for index, block in enumerate(stack_of(transformer, stack)):
                hooks.enter_context(_recorded(block, (stack, index), calls))
        output = transformer(**inputs)
    return Forward(calls, output)


@contextmanager
def _recorded(block: nn.Module, key: BlockKey, calls: list[Call]) -> Iterator[None]:
    signature, open_calls = inspect.signature(block.forward), list[Call]()

    def before(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        named = by_name(signature, args, kwargs)
        open_calls.append(Call(key, named, None, versions(named)))

    def after(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        call = open_calls.pop()
        call.output, call.returned = output, versions(output)
        calls.append(call)

    handles = [
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(
    blocks: Mapping[BlockKey, nn.Module], forward: Callable[[BlockKey, dict[str, Any]], Any]
) -> Iterator[None]:
    """Make each of `blocks` return `forward(key, arguments)` in place of what it computes, within the context.

    `key`: its key in `blocks`. The blocks keep their attributes, which some transformers read.
    """

    def stand_in(key: BlockKey, signature: inspect.Signature) -> Callable:
        return lambda *args, **kwargs: forward(key, by_name(signature, args, kwargs))

    own = {key: vars(block).get("forward") for key, block in blocks.items()}
    for key, block in blocks.items():
        block.forward = stand_in(key, inspect.signature(block.forward))  # type: ignore[method-assign]
    try:
        yield
    finally:
        for key, block in blocks.items():
            if own[key] is None:
                del block.forward
            else:
                block.forward = own[key]  # type: ignore[method-assign, assignment]
