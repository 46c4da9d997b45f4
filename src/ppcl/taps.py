"""Taps on a stock diffusers transformer: forward hooks that show the inputs and outputs of its blocks.

A stream is one of the token sequences that pass through blocks, `image` or `text`. A stack is a list of blocks, named
by its path in the transformer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import psutil
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ppcl.errors import UsageError

Streams = dict[str, Tensor]
BlockKey = tuple[str, int]


class Tapped(Protocol):
    """The part of a `Family` that taps use: where the blocks are, and which tensors of a call are streams."""

    @property
    def stacks(self) -> Mapping[str, str]: ...

    def blocks(self, transformer: nn.Module) -> dict[BlockKey, nn.Module]: ...

    def streams_in(self, stack: str, kwargs: dict[str, Any], inputs: Mapping[str, Any]) -> Streams: ...

    def streams_out(self, stack: str, output: Any, inputs: Mapping[str, Any]) -> Streams: ...


def stack_of(transformer: nn.Module, stack: str) -> nn.ModuleList:
    """Return the block list at the path `stack`, such as `transformer_blocks` or `encoder.blocks`."""
    blocks = transformer.get_submodule(stack)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def replace_stack(transformer: nn.Module, stack: str, blocks: nn.ModuleList) -> None:
    """Replace the block list at the path `stack` by `blocks`."""
    owner, _, name = stack.rpartition(".")
    setattr(transformer.get_submodule(owner), name, blocks)


@dataclass
class BlockCall:
    """One call of one block: all its arguments by keyword, and its input and output streams `[B, tokens, D]`.

    `stack` and `index` say which block it is. `output`: what it returned, of which the output streams are parts.
    """

    stack: str
    index: int
    kwargs: dict[str, Any]
    inputs: Streams
    outputs: Streams
    output: Any = None

    @property
    def key(self) -> BlockKey:
        """The block's stack and index."""
        return self.stack, self.index


class NotedInputs(dict[str, Any]):
    """Inputs of a forward that record which of their keys were read.

    A family looks some inputs up to find the streams of a block. Just these have to be stored beside a block's call.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        super().__init__(inputs)
        self._noted: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._noted.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 - this is what `get` is

    def asked_for(self) -> dict[str, Any]:
        """Return the inputs that were read, by key."""
        return {key: self[key] for key in sorted(self._noted)}


class StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Raised in a hook to end the transformer's forward early."""


def by_name(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name, so that the call can be repeated with keywords.

    Values that the block takes as `*args` have no name and are left out. Blocks have `*args` only to ignore arguments
    that other blocks of the model read.
    """
    named = {**signature.bind(*args, **kwargs).arguments}
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            named.pop(name, None)
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


@contextmanager
def hooked(
    family: Tapped,
    transformer: nn.Module,
    inputs_now: Callable[[], Mapping[str, Any]],
    on_block: Callable[[BlockCall], Any],
    before_block: Callable[[], None] | None = None,
) -> Iterator[None]:
    """Call `on_block` after each block in the context, and `before_block` before each block.

    What `on_block` returns replaces the block's output, unless it is None.

    `inputs_now` returns the inputs of the forward now running.
    """

    def tap(stack: str, index: int, block: nn.Module) -> Callable:
        signature = inspect.signature(block.forward)

        def hook(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            if args:  # many models pass arguments by position, and so does gradient checkpointing
                kwargs = by_name(signature, args, kwargs)
            inputs = inputs_now()
            before = family.streams_in(stack, kwargs, inputs)
            return on_block(BlockCall(stack, index, kwargs, before, family.streams_out(stack, output, inputs), output))

        return hook

    blocks = family.blocks(transformer)
    handles = [
        block.register_forward_hook(tap(stack, index, block), with_kwargs=True)
        for (stack, index), block in blocks.items()
    ]
    if before_block is not None:
        # First of a block's hooks: one that loads the block's weights must not run while other inputs still need the
        # block before.
        handles += [
            block.register_forward_pre_hook(lambda *_: before_block(), prepend=True) for block in blocks.values()
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe(
    family: Tapped,
    transformer: nn.Module,
    inputs: dict[str, Any],
    on_block: Callable[[BlockCall], None],
    *,
    last: BlockKey | None = None,
) -> Any:
    """Run the transformer on `inputs` and call `on_block` after each block, in order of execution.

    Returns what the model's forward returns. With `last`, the forward ends after that block and None is returned.
    """

    def watch(call: BlockCall) -> None:
        on_block(call)
        if call.key == last:
            raise StopForward

    with hooked(family, transformer, lambda: inputs, watch):
        try:
            output = transformer(**inputs)
        except StopForward:
            return None
    return None if last else output  # a sharded model ends its forward by itself


# A block's own activations in one call, as a multiple of its output streams: queries, keys and values twice, the
# attention's output, and both sides of the activation of an FFN four times as wide.
_INSIDE_BLOCK = 14


def free_bytes(device: torch.device) -> float:
    """Return the free memory of a device in bytes; infinity if it is not known.

    On a GPU of which this process may use a share alone (`torch.cuda.set_per_process_memory_fraction`), of that share.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allowed = total * torch.cuda.get_per_process_memory_fraction(device)
        used, held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return min(free + held, allowed) - used
    return psutil.virtual_memory().available if device.type == "cpu" else float("inf")


def _check_room(call: BlockCall, more: int, size_keys: str) -> None:
    """Raise `UsageError` if the output streams of `more` inputs as large as those of `call` exceed the free memory.

    What a block computes inside is counted too. What callers compute from a block's streams is not: they take a few
    rows at a time, which is less. One input alone is never refused, as its first block has just run.
    """
    streams = list(call.outputs.values())
    if isinstance(streams[0], FakeTensor):  # of a dry run, which allocates nothing
        return
    needed, free = (more + _INSIDE_BLOCK) * sum(stream.nbytes for stream in streams), free_bytes(streams[0].device)
    if more and needed > free:
        raise UsageError(
            f"{more + 1} batches of {len(streams[0])} samples need {needed / 1e9:.1f} GB for activations at once, and "
            f"{free / 1e9:.1f} GB are free on {streams[0].device}: lower {size_keys}."
        )


def observe_abreast(
    family: Tapped,
    transformer: nn.Module,
    inputs: Sequence[Mapping[str, Any]],
    *,
    last: BlockKey | None = None,
    size_keys: str = "the number of samples",
    done: Callable[[int, Any], object] | None = None,
) -> Iterator[tuple[int, BlockCall]]:
    """Run the transformer on several inputs block by block: each block runs on all inputs before the next block runs.

    Yields `(number of the input, call)` after each call of a block, up to the block `last`. Without `last` the forwards
    end, and `done(number, output)` is called with what each returns. A streamed block is thus read from disk once for
    all inputs, and statistics of a block are complete when the next one begins. The cost is memory for the streams of
    all inputs at one block.

    Every input has a stock forward of its own, in a greenlet that pauses before each block, where it holds nothing of
    the block before but its outputs. Threads would be slower, because each would have OpenMP workers of its own that
    wait beside the running ones.

    Raises `UsageError` after the first block if the streams of all inputs will not fit into memory. The message tells
    to lower `size_keys`.
    """
    checked = False

    def forward(number: int) -> None:
        with suppress(StopForward):
            output = transformer(**inputs[number])
            if done is not None:
                done(number, output)

    def pause(call: BlockCall | None = None) -> None:
        getcurrent().parent.switch(call)

    strands = [greenlet(partial(forward, number)) for number in range(len(inputs))]
    running = dict(zip(strands, inputs, strict=True))
    with hooked(family, transformer, lambda: running[getcurrent()], pause, pause):
        try:
            while not all(strand.dead for strand in strands):
                for number, strand in enumerate(strands):
                    if not strand and not strand.dead:  # a greenlet is true if it has started and not ended
                        strand.switch()  # to the first block
                    if strand.dead:
                        continue
                    call = strand.switch()
                    if not checked:
                        _check_room(call, len(inputs) - 1, size_keys)
                        checked = True
                    yield number, call
                    at_end = call.key == last
                    del call  # and with it the block's inputs
                    if at_end:
                        strand.throw(StopForward)
                    else:
                        strand.switch()  # to the next block
        finally:
            for strand in filter(bool, strands):
                strand.throw(StopForward)


def observe_each(
    family: Tapped,
    transformer: nn.Module,
    inputs: Sequence[dict[str, Any]],
    on_block: Sequence[Callable[[BlockCall], None]],
    *,
    last: BlockKey,
) -> None:
    """Run the transformer on several inputs up to the block `last`, and call `on_block[n]` after each block on input n.

    Each block runs on all inputs before the next block runs. Raises `UsageError` as `observe_abreast` does.
    """
    if len(inputs) == 1:
        observe(family, transformer, inputs[0], on_block[0], last=last)
        return
    for number, call in observe_abreast(family, transformer, inputs, last=last, size_keys="distill.batch_size"):
        on_block[number](call)


def inputs_of(block: nn.Module, names: Iterable[str], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Call `block` with `kwargs` and return the first inputs of the submodules `names`, in order of execution.

    The call ends early when all of them have been reached. Submodules that are not called are left out.
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
