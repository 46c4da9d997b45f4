"""Streaming of a teacher that does not fit in memory: its blocks are read from their files when they are called.

While one block computes, a thread prefetches the next one from the model's own safetensors files. Two blocks are in
memory at a time, however many the model has. diffusers' group offloading would not do: it needs the whole model in
host memory first, or a second copy of it on disk.
"""

from __future__ import annotations

import copy
import ctypes
import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor, nn

from ppcl.artifacts.model_files import Stored, stored_tensors
from ppcl.components import dtype_of
from ppcl.errors import UsageError
from ppcl.families.base import Family
from ppcl.model_fit import check_fit, without_weights

Weights = dict[str, Tensor]

MOST_ABREAST = 8  # batches for which a streamed teacher is read once

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _read_into(stored: Stored, handle: Any, target: Tensor) -> None:
    """Copy the tensor `stored` from its open file `handle` into `target`, cast to the dtype of `target`.

    `target`: a flat tensor in host memory with as many elements as the stored one. The file is read, not mapped into
    memory, so that its pages do not count as memory of this process.

    Raises `UsageError` if the file is shorter than it was when it was opened.
    """
    dtype = _DTYPES[stored.dtype]
    raw = target if target.dtype == dtype else torch.empty(len(target), dtype=dtype)
    buffer: Any = raw.view(torch.uint8).numpy()
    left, place = memoryview(buffer), stored.start
    while left:
        count = os.preadv(handle.fileno(), [left], place)
        if not count:
            raise UsageError(f"{stored.path} ended while it was read: it was changed or cut short.")
        left, place = left[count:], place + count
    if raw is not target:
        target.copy_(raw)


class BlockStream:
    """Loads the weights of each block when it is called, and releases them when another block is called.

    Each block gets a forward pre-hook that calls `arrive`. Weights are read into one of two buffers, each as large as
    the largest block. The buffers are allocated once, because the system would not get back all memory of blocks that
    are allocated and freed in turn.

    Parameters of a block that is not loaded are NaN, expanded from a single number. Code that reads them without
    `still` gets NaN, so that the mistake is noticed.

    The block to prefetch is the one that followed last time, after the same two blocks: a forward may end early, and
    then the first block follows. In a backward pass with gradient checkpointing, blocks are called in reverse.

    `blocks`: modules by the prefix of their parameter names, in order of execution.
    `stored`: the location of every parameter that is streamed, by its full name. Blocks keep all others.
    `device`, `dtype`: those of the loaded weights.
    """

    def __init__(
        self, blocks: dict[str, nn.Module], stored: dict[str, Stored], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.names, self.blocks = list(blocks), list(blocks.values())
        self.stored, self.device, self.dtype = stored, device, dtype
        self._current: int | None = None
        self._ahead: tuple[int, Future[Weights]] | None = None
        self._follows: dict[tuple[int | None, int], int] = {}  # by a block and the one before it
        self._before: int | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="blocks")
        size = max(self._size(number) for number in range(len(self.blocks)))
        self._buffers = [torch.empty(size, dtype=dtype, device=device) for _ in range(2)]
        self._next_buffer = 0
        if device.type == "cuda":
            self._staging = torch.empty(size, dtype=dtype, pin_memory=True)
            self._copies = torch.cuda.Stream(device)
            self._copied = torch.cuda.Event()
        self._handles: list[Any] = []
        for number, block in enumerate(self.blocks):
            for name, parameter in list(self._streamed(number)):
                nothing = torch.full((), torch.nan, dtype=dtype, device=device).expand(parameter.shape)
                set_module_tensor_to_device(block, name, device, nothing, dtype)
            self._handles.append(self._watch(number))

    def _streamed(self, number: int) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the streamed parameters of block `number` with their names in it."""
        prefix = self.names[number] + "."
        return ((name, each) for name, each in self.blocks[number].named_parameters() if prefix + name in self.stored)

    def _size(self, number: int) -> int:
        """Return the elements of a buffer for block `number`."""
        return sum(_aligned(parameter.numel()) for _, parameter in self._streamed(number))

    def _watch(self, number: int) -> Any:
        return self.blocks[number].register_forward_pre_hook(_Arrival(self, number), prepend=True)

    def arrive(self, number: int) -> None:
        """Load block `number`, release the block before it, and start to prefetch the block that should come next."""
        if number == self._current:
            return
        before, self._current = self._current, None
        if before is not None:
            self._follows[self._before, before] = number
            self._empty(before)
        self._before = before
        ahead, self._ahead = self._ahead, None
        weights = ahead[1].result() if ahead is not None else {}
        if ahead is None or ahead[0] != number:
            weights = self._submit(number).result()
        self._fill(number, weights)
        self._current = number
        following = self._follows.get((before, number), (number + 1) % len(self.blocks))
        if following != number:
            self._ahead = following, self._submit(following)

    def wait(self) -> None:
        """Wait until nothing is read ahead."""
        if self._ahead is not None:
            self._ahead[1].result()

    def _submit(self, number: int) -> Future[Weights]:
        """Start to read a block into the buffer that the current block does not use."""
        buffer = self._buffers[self._next_buffer]
        self._next_buffer = 1 - self._next_buffer
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.current_stream(self.device).record_event()
        return self._reader.submit(self._read, number, buffer, done)

    def _read(self, number: int, buffer: Tensor, done: Any = None) -> Weights:
        """Read a block's weights into `buffer` and return views of it by parameter name.

        `done`: the CUDA event after which `buffer` is free. On a GPU the copies are asynchronous: they may still be
        running when this returns.
        """
        prefix, weights, start = self.names[number] + ".", Weights(), 0
        with ExitStack() as opened:
            files: dict[Path, Any] = {}
            target = buffer
            if self.device.type == "cuda":
                self._copied.synchronize()  # the last copy has left the staging buffer
                self._copies.wait_event(done)
                opened.enter_context(torch.cuda.stream(self._copies))
                target = self._staging
            for name, parameter in self._streamed(number):
                stored = self.stored[prefix + name]
                if stored.path not in files:
                    files[stored.path] = opened.enter_context(stored.path.open("rb", buffering=0))
                part = slice(start, start + parameter.numel())
                _read_into(stored, files[stored.path], target[part])
                weights[name] = buffer[part].view(parameter.shape)
                if target is not buffer:
                    buffer[part].copy_(target[part], non_blocking=True)
                start += _aligned(parameter.numel())
            if self.device.type == "cuda":
                self._copied.record(self._copies)
        return weights

    @torch.inference_mode(False)  # weights that are assigned in inference mode could not be shared or trained with
    def _fill(self, number: int, weights: Weights) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
        for name, parameter in self._streamed(number):
            parameter.data = weights[name]

    @torch.inference_mode(False)
    def _empty(self, number: int) -> None:
        for _, parameter in self._streamed(number):
            parameter.data = parameter.data.new_full((), torch.nan).expand(parameter.shape)

    @contextmanager
    def still(self, number: int) -> Iterator[None]:
        """Load the weights of block `number` for the context, so that it can be read or copied.

        The streaming hook is removed meanwhile, so that a copy does not have it. A block that is not the current one
        gets memory of its own, which leaves the buffers alone.
        """
        self._handles[number].remove()
        if number != self._current:
            self.wait()  # two reads at once would share the staging buffer
            done = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
            with torch.inference_mode(False):
                own = self._buffers[0].new_empty(self._size(number))
                self._fill(number, self._read(number, own, done))
        try:
            yield
        finally:
            if number != self._current:
                self._empty(number)
            self._handles[number] = self._watch(number)


def _aligned(count: int) -> int:
    """Round a number of elements up to a multiple of 64, so that the next tensor in a buffer is aligned as torch's."""
    return -(-count // 64) * 64


@dataclass(frozen=True)
class _Arrival:
    """Forward pre-hook of a streamed block, which loads its weights."""

    stream: BlockStream
    number: int

    def __call__(self, block: nn.Module, args: Any) -> None:
        self.stream.arrive(self.number)

    def __deepcopy__(self, memo: Any) -> _Arrival:
        return self  # a copy that shares the block's parameters shares its stream


@contextmanager
def still(*blocks: nn.Module) -> Iterator[None]:
    """Load the weights of the streamed ones among `blocks` for the context, so that they can be read or copied."""
    with ExitStack() as held:
        for block in blocks:
            for hook in list(block._forward_pre_hooks.values()):
                if isinstance(hook, _Arrival):
                    held.enter_context(hook.stream.still(hook.number))
        yield


def follow(block: nn.Module, other: nn.Module) -> None:
    """Make `block` load the parameters that it shares with the streamed block `other` whenever it is called.

    Does nothing if `other` is not streamed or shares no parameter. A backward pass through `block` needs gradient
    checkpointing, whose second forward loads the weights again.
    """
    shared = {*block.parameters()} & {*other.parameters()}
    for hook in list(other._forward_pre_hooks.values()):
        if shared and isinstance(hook, _Arrival):
            block.register_forward_pre_hook(hook, prepend=True)


def wait_for_reads(block: nn.Module) -> None:
    """Wait until nothing is read ahead in the stream of `block`, so that its next call can be timed."""
    for hook in block._forward_pre_hooks.values():
        if isinstance(hook, _Arrival):
            hook.stream.wait()


def is_streamed(block: nn.Module) -> bool:
    """Return whether the weights of `block` are read from disk when it is called."""
    return any(isinstance(hook, _Arrival) for hook in block._forward_pre_hooks.values())


def resident(block: nn.Module) -> nn.Module:
    """Return `block`, or if it is streamed a copy of it that keeps its weights in memory."""
    if not is_streamed(block):
        return block
    with still(block):
        return copy.deepcopy(block)


def _give_freed_memory_back() -> None:
    """Make glibc return the memory of large tensors to the system as soon as they are freed.

    glibc does so for allocations above a threshold (`M_MMAP_THRESHOLD`), which it raises whenever a larger one is
    freed. Activations then come from the fragmented heap: peak memory was up to 50% higher, and differed between runs.
    Setting the threshold, here to its initial 128 KiB, stops glibc from raising it.
    """
    m_mmap_threshold, size = -3, 128 << 10
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(m_mmap_threshold, size)


def load_streamed(
    family: Family, folder: Path, device: torch.device, dtype: torch.dtype, variant: str | None = None
) -> nn.Module:
    """Return the transformer saved in `folder`, in eval mode, with blocks that are streamed from its files.

    Everything but the blocks is loaded to `device`, and of the blocks what diffusers keeps in float32 whatever `dtype`
    is: norms and the like. Do not change the files while the model is in use. `variant`: see `model.variant`.

    Raises `UsageError` if the folder has no safetensors files, lacks a tensor of the model or holds others, or holds
    one of a dtype other than F64, F32, F16 and BF16 (a quantised model).
    """
    _give_freed_memory_back()
    transformer = without_weights(family.transformer_class, folder)
    stored = stored_tensors(folder, variant)
    check_fit(transformer, {name: each.shape for name, each in stored.items()}, folder, family.stacks)
    unused = sorted(stored.keys() - transformer.state_dict().keys())
    if unused:  # as diffusers warns
        logging.getLogger(__name__).warning(
            "%s were not used: its config.json has no place for them.", ", ".join(unused)
        )
    other = [name for name in transformer.state_dict() if stored[name].dtype not in _DTYPES]
    if other:
        raise UsageError(
            f"{folder} has {other[0]} as {stored[other[0]].dtype}, which model.streaming=true does not read: give a "
            "model that is not quantised."
        )
    blocks = {f"{stack}.{index}": block for (stack, index), block in family.blocks(transformer).items()}
    inside = tuple(f"{name}." for name in blocks)
    for name in transformer.state_dict():
        own = dtype_of(family.transformer_class, name, dtype)
        if not name.startswith(inside) or own != dtype:
            with safe_open(stored[name].path, framework="pt") as file:
                value = file.get_tensor(name).to(own, copy=True)
            set_module_tensor_to_device(transformer, name, device, value, own)
            del stored[name]
    BlockStream(blocks, stored, device, dtype)
    return transformer.eval()
