"""Taps on a stock diffusers transformer: what goes into and comes out of its blocks, by hooks alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Semaphore, Thread, current_thread
from typing import TYPE_CHECKING, Any, cast

import psutil
import torch
from torch import Tensor, nn

from ppcl.errors import UsageError

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


class _Strand(Thread):
    """One forward that rests after every block; it runs while its owner waits in `advance`, and never else."""

    def __init__(self, transformer: nn.Module, inputs: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.transformer, self.inputs = transformer, inputs
        self.gradients = torch.is_grad_enabled()  # a thread has its own of both, and sums depend on the second
        self.num_threads = torch.get_num_threads()
        self.call: BlockCall | None = None
        self.error: BaseException | None = None
        self.stopped = False
        self._go, self._rested = Semaphore(0), Semaphore(0)
        self.start()

    def run(self) -> None:
        self._go.acquire()
        try:
            if not self.stopped:
                torch.set_num_threads(self.num_threads)
                with torch.set_grad_enabled(self.gradients), suppress(StopForward):
                    self.transformer(**self.inputs)
        except BaseException as error:
            self.error = error
        self.stopped = True
        self._rested.release()

    def rest(self, call: BlockCall) -> None:
        self.call = call
        self._rested.release()
        self._go.acquire()
        if self.stopped:
            raise StopForward

    def advance(self) -> BlockCall | None:
        """Run to the end of the next block; None if there is none any more."""
        self.call = None
        self._go.release()
        self._rested.acquire()
        if self.error is not None:
            raise self.error
        return self.call

    def stop(self) -> None:
        alive, self.stopped = not self.stopped, True
        if alive:
            self._go.release()
        self.join()


def _free_bytes(device: torch.device) -> float:
    """What can still be had of a device's memory; infinite where nobody says."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available if device.type == "cpu" else float("inf")


def _check_room(call: BlockCall, more: int, size_keys: str) -> None:
    """`UsageError` where the streams of `more` inputs like the one of `call` do not fit beside it."""
    streams = list(call.outputs.values())
    needed, free = more * sum(stream.nbytes for stream in streams), _free_bytes(streams[0].device)
    if needed > free:
        raise UsageError(
            f"{more + 1} batches of {len(streams[0])} samples hold {needed / 1e9:.1f} GB of activations at once, and "
            f"{free / 1e9:.1f} GB are free on {streams[0].device}: lower {size_keys}."
        )


def observe_abreast(
    family: Family,
    transformer: nn.Module,
    inputs: Sequence[dict[str, Any]],
    *,
    last: BlockKey | None = None,
    size_keys: str = "the number of samples",
) -> Iterator[tuple[int, BlockCall]]:
    """Run the transformer on several inputs at once: every block sees all of them before the next block runs.

    Yields the number of the input and the call, after each. A streamed block is read once for all inputs, and what
    is gathered of a block can be finished with when the next one comes; the price is that one block's streams of
    all inputs are held. Each forward is the stock one, in a thread of its own, and one runs at a time.

    `UsageError`, which tells to lower `size_keys`, if what is held will not fit; known after the first block.
    """
    strands = [_Strand(transformer, each) for each in inputs]
    checked = False

    def rest(call: BlockCall) -> None:
        cast(_Strand, current_thread()).rest(call)

    with _hooked(family, transformer, rest):
        try:
            alive = list(enumerate(strands))
            while alive:
                for number, strand in alive:
                    call = strand.advance()
                    if call is not None:
                        if not checked:
                            _check_room(call, len(inputs) - 1, size_keys)
                            checked = True
                        yield number, call
                        if call.key == last:
                            strand.stop()
                alive = [(number, strand) for number, strand in alive if not strand.stopped]
        finally:
            for strand in strands:
                strand.stop()


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
