"""A teacher larger than memory: its blocks stay in their safetensors files and come one ahead of use.

diffusers' group offloading needs the whole model in host memory first, or a second copy of it on disk. Here a block
is read from the file that is there anyway, by another thread while the block before it computes; two are held at a
time, however many there are.
"""

from __future__ import annotations

import copy
import ctypes
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor, nn

from ppcl.artifacts.files import check_safetensors, read_json
from ppcl.errors import UsageError
from ppcl.families.base import Family

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its bytes from `start` on in a file, and of which type they are (safetensors' name)."""

    path: Path
    dtype: str
    start: int

    def read_into(self, handle: Any, target: Tensor) -> None:
        """Fill the flat `target`, in host memory, from the open file: past it no page of the file is held."""
        dtype = _DTYPES[self.dtype]
        raw = target if target.dtype == dtype else torch.empty(len(target), dtype=dtype)
        buffer: Any = raw.view(torch.uint8).numpy()
        left, place = memoryview(buffer), self.start
        while left:
            count = os.preadv(handle.fileno(), [left], place)
            if not count:
                raise UsageError(f"{self.path} ended while it was read: it was changed or cut short.")
            left, place = left[count:], place + count
        if raw is not target:
            target.copy_(raw)


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Where each tensor of a saved model's `folder` lies."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    named: dict[str, str] | None = read_json(indices[0], "A model's index")["weight_map"] if indices else None
    paths = sorted({folder / file for file in named.values()} if named else folder.glob("*.safetensors"))
    if not paths:
        raise UsageError(f"{folder} holds no safetensors: model.streaming=true reads no other files.")
    found: dict[str, Stored] = {}
    for path in paths:
        check_safetensors(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            if named is None or named.get(name) == path.name:
                found[name] = Stored(path, entry["dtype"], 8 + length + entry["data_offsets"][0])
    return found


class BlockStream:
    """Gives each block its weights when it is called, and takes them again when another one is.

    They lie in one of two buffers that are made once: the memory of blocks that come and go would not all go back to
    the system. A block whose weights are elsewhere holds NaN in their place, which costs a number each: used past
    this class it would be seen at once. The order of the blocks is learned from the calls, as a pass may end early.
    """

    def __init__(
        self, blocks: dict[str, nn.Module], stored: dict[str, Stored], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.names, self.blocks = list(blocks), list(blocks.values())
        self.stored, self.device, self.dtype = stored, device, dtype
        self._current: int | None = None
        self._ahead: tuple[int, Future[Weights]] | None = None
        self._follows: dict[int, int] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="blocks")
        size = max(sum(_aligned(p.numel()) for p in block.parameters()) for block in self.blocks)
        self._buffers = [torch.empty(size, dtype=dtype, device=device) for _ in range(2)]
        self._next_buffer = 0
        if device.type == "cuda":
            self._staging = torch.empty(size, dtype=dtype, pin_memory=True)
            self._copies = torch.cuda.Stream(device)
            self._copied = torch.cuda.Event()
        self._handles: list[Any] = []
        for number, block in enumerate(self.blocks):
            for name, parameter in list(block.named_parameters()):
                nothing = torch.full((), torch.nan, dtype=dtype, device=device).expand(parameter.shape)
                set_module_tensor_to_device(block, name, device, nothing, dtype)
            self._handles.append(self._watch(number))

    def _watch(self, number: int) -> Any:
        return self.blocks[number].register_forward_pre_hook(_Arrival(self, number), prepend=True)

    def arrive(self, number: int) -> None:
        """Hold block `number` and begin to read the one that is likely to be next."""
        if number == self._current:
            return
        before, self._current = self._current, None
        if before is not None:
            self._follows[before] = number
            self._empty(before)
        ahead, self._ahead = self._ahead, None
        weights = ahead[1].result() if ahead is not None else {}
        if ahead is None or ahead[0] != number:
            weights = self._submit(number).result()
        self._fill(number, weights)
        self._current = number
        following = self._follows.get(number, (number + 1) % len(self.blocks))
        if following != number:
            self._ahead = following, self._submit(following)

    def _submit(self, number: int) -> Future[Weights]:
        """Read a block into the buffer whose block is done with."""
        buffer = self._buffers[self._next_buffer]
        self._next_buffer = 1 - self._next_buffer
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.current_stream(self.device).record_event()
        return self._reader.submit(self._read, number, buffer, done)

    def _read(self, number: int, buffer: Tensor, done: Any = None) -> Weights:
        """A block's weights by name, in `buffer`; on a GPU they may still be on their way when this returns."""
        prefix, weights, start = self.names[number] + ".", Weights(), 0
        with ExitStack() as opened:
            files: dict[Path, Any] = {}
            target = buffer
            if self.device.type == "cuda":
                self._copied.synchronize()  # the staging buffer has been read
                self._copies.wait_event(done)
                opened.enter_context(torch.cuda.stream(self._copies))
                target = self._staging
            for name, parameter in self.blocks[number].named_parameters():
                stored = self.stored[prefix + name]
                if stored.path not in files:
                    files[stored.path] = opened.enter_context(stored.path.open("rb", buffering=0))
                part = slice(start, start + parameter.numel())
                stored.read_into(files[stored.path], target[part])
                weights[name] = buffer[part].view(parameter.shape)
                if target is not buffer:
                    buffer[part].copy_(target[part], non_blocking=True)
                start += _aligned(parameter.numel())
            if self.device.type == "cuda":
                self._copied.record(self._copies)
        return weights

    def _fill(self, number: int, weights: Weights) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
        for name, parameter in self.blocks[number].named_parameters():
            parameter.data = weights[name]

    def _empty(self, number: int) -> None:
        for parameter in self.blocks[number].parameters():
            parameter.data = parameter.data.new_full((), torch.nan).expand(parameter.shape)

    @contextmanager
    def still(self, number: int) -> Iterator[None]:
        """The block as any other: with its weights, in memory of its own, and copied without being streamed."""
        self._handles[number].remove()
        if number != self._current:
            if self._ahead is not None:
                self._ahead[1].result()  # one reads at a time
            size = sum(_aligned(parameter.numel()) for parameter in self.blocks[number].parameters())
            done = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
            self._fill(number, self._read(number, self._buffers[0].new_empty(size), done))
        try:
            yield
        finally:
            if number != self._current:
                self._empty(number)
            self._handles[number] = self._watch(number)


def _aligned(count: int) -> int:
    """So many numbers that the next tensor starts where torch would let one start."""
    return -(-count // 64) * 64


@dataclass(frozen=True)
class _Arrival:
    """The hook of a streamed block."""

    stream: BlockStream
    number: int

    def __call__(self, block: nn.Module, args: Any) -> None:
        self.stream.arrive(self.number)


@contextmanager
def still(*blocks: nn.Module) -> Iterator[None]:
    """Hold those of `blocks` that are streamed, with their weights, so that these can be read or copied."""
    with ExitStack() as held:
        for block in blocks:
            for hook in list(block._forward_pre_hooks.values()):
                if isinstance(hook, _Arrival):
                    held.enter_context(hook.stream.still(hook.number))
        yield


def resident(block: nn.Module) -> nn.Module:
    """Return `block` itself, or a copy of one that is streamed, which has weights only while it runs."""
    if not any(isinstance(hook, _Arrival) for hook in block._forward_pre_hooks.values()):
        return block
    with still(block):
        return copy.deepcopy(block)


def _give_freed_memory_back() -> None:
    """Have glibc return the memory of every tensor of some size when it goes.

    By itself it raises the size from which it does so to that of what was freed: activations then lie in pieces between
    smaller things, and a stage's peak was seen to be half as much again, differently in every run. The size it starts
    with stays, once it is set.
    """
    m_mmap_threshold, size = -3, 128 << 10
    with suppress(AttributeError, OSError):  # not glibc's
        ctypes.CDLL(None).mallopt(m_mmap_threshold, size)


def load_streamed(family: Family, folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The transformer in `folder` with all but its blocks in memory; those come from the files when called."""
    _give_freed_memory_back()
    config = family.transformer_class.load_config(folder)
    stored = stored_tensors(folder)
    with init_empty_weights(include_buffers=False):
        transformer = family.transformer_class.from_config(config)
    missing = [name for name in transformer.state_dict() if name not in stored]
    if missing:
        raise UsageError(f"{folder} lacks {missing[0]} and {len(missing) - 1} more tensors of this model.")
    other = [name for name in transformer.state_dict() if stored[name].dtype not in _DTYPES]
    if other:
        raise UsageError(
            f"{folder} has {other[0]} as {stored[other[0]].dtype}, which model.streaming=true does not read: give a "
            "model that is not quantised."
        )
    blocks = {f"{stack}.{index}": block for (stack, index), block in family.blocks(transformer).items()}
    inside = tuple(f"{name}." for name in blocks)
    for name in transformer.state_dict():
        if not name.startswith(inside):
            with safe_open(stored[name].path, framework="pt") as file:
                value = file.get_tensor(name).to(dtype, copy=True)
            set_module_tensor_to_device(transformer, name, device, value, dtype)
    BlockStream(blocks, stored, device, dtype)
    return transformer.eval()
