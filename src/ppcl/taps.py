"""Taps on a stock diffusers transformer: what goes into and comes out of its blocks, by hooks alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from ppcl.families.base import Family

Streams = dict[str, Tensor]
BlockKey = tuple[str, int]


@dataclass
class BlockCall:
    """One call of one block: its keyword arguments, and its streams `[B, tokens, D]` on both sides."""

    stack: str
    index: int
    kwargs: dict[str, Any]
    inputs: Streams
    outputs: Streams

    @property
    def key(self) -> BlockKey:
        return self.stack, self.index


class StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Leaves the transformer's forward from inside a hook."""


@contextmanager
def _hooked(family: Family, transformer: nn.Module, on_block: Callable[[BlockCall], None]) -> Iterator[None]:
    def tap(stack: str, index: int) -> Callable:
        def hook(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if args:  # gradient checkpointing passes positions
                kwargs = {**signatures[stack, index].bind(*args, **kwargs).arguments}
            inputs = family.streams_in(stack, kwargs)
            on_block(BlockCall(stack, index, kwargs, inputs, family.streams_out(stack, output)))

        return hook

    signatures = {
        (stack, index): inspect.signature(block.forward)
        for stack in family.stacks
        for index, block in enumerate(getattr(transformer, stack))
    }
    handles = [
        block.register_forward_hook(tap(stack, index), with_kwargs=True)
        for stack in family.stacks
        for index, block in enumerate(getattr(transformer, stack))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe(
    family: Family,
    transformer: nn.Module,
    inputs: dict[str, Any],
    on_block: Callable[[BlockCall], None],
    *,
    last: BlockKey | None = None,
) -> Tensor | None:
    """Run the transformer and call `on_block` after each block, in order of execution.

    After the block `last` the forward ends early and None is returned; else the model's output.
    """

    def watch(call: BlockCall) -> None:
        on_block(call)
        if call.key == last:
            raise StopForward

    with _hooked(family, transformer, watch):
        try:
            return transformer(**inputs)[0]
        except StopForward:
            return None


def inputs_of(block: nn.Module, names: Iterable[str], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """What goes into those submodules of a block that is called with `kwargs`, in order of execution.

    The call ends when all of them have been reached; those that a block does not call are left out.
    """
    wanted, found = set(names), dict[str, Tensor]()

    def tap(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = args[0]
            if found.keys() == wanted:
                raise StopForward

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(tap(name)) for name in wanted]
    try:
        with suppress(StopForward):
            block(**kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found
