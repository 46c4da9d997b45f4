"""A teacher's activations at the boundaries of intervals, on disk: all that a student needs of its teacher.

Per interval a folder with `init.safetensors`, what the student starts from, and shards of a few steps: a JSON that says
what block u was called with and what block v returned, and a safetensors file of the tensors it names. Those
are named by their content, so what is the same in every step (rotations) lies in a shard once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ppcl.artifacts import check_safetensors, read_json, write_json, write_tensors
from ppcl.ops.losses import Average, own
from ppcl.taps import Streams

STEPS_PER_SHARD = 8
TRAIN, HELD_OUT = "train", "heldout"


@dataclass
class Boundary:
    """One call: block u's keyword arguments, block v's streams `[B, tokens, D]`, and which tokens count."""

    kwargs: dict[str, Any]
    outputs: Streams
    masks: dict[str, Tensor | None]


@dataclass
class BoundaryBatch:
    """The same step of several intervals; `sigmas` `[B]` as of any batch."""

    parts: list[Boundary]
    sigmas: Tensor

    @property
    def average(self) -> Average:
        """As of a `TrainingBatch`; this one no rank shares."""
        return own


def _describe(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors put into `tensors` and named by their content."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        facts = f"{plain.dtype}{tuple(plain.shape)}".encode()
        content = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        name = hashlib.blake2b(facts + content, digest_size=12).hexdigest()
        tensors[name] = plain
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _describe(item, tensors) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_describe(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"plain": value}
    raise TypeError(f"a block was called with a {type(value).__name__}, which is not kept")


def _restore(described: Any, tensor: Any) -> Any:
    ((kind, value),) = described.items()
    if kind == "tensor":
        return tensor(value)
    if kind == "dict":
        return {key: _restore(item, tensor) for key, item in value.items()}
    if kind in ("list", "tuple"):
        items = [_restore(item, tensor) for item in value]
        return items if kind == "list" else tuple(items)
    return value


class BoundaryWriter:
    """Gathers an interval's steps and writes them a shard at a time."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.shard = 0
        self._clear()

    def _clear(self) -> None:
        self._steps: list[Any] = []
        self._tensors: dict[str, Tensor] = {}

    @property
    def pending_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def add(self, boundary: Boundary, sigmas: Tensor) -> None:
        content = {**vars(boundary), "sigmas": sigmas}
        self._steps.append(_describe(content, self._tensors))
        if len(self._steps) == STEPS_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        if self._steps:
            stem = self.folder / f"{self.kind}-{self.shard:04d}"
            write_tensors(stem.with_suffix(".safetensors"), self._tensors, {})
            write_json(stem.with_suffix(".json"), {"steps": self._steps})  # last: it says that the tensors are whole
        self.shard += 1
        self._clear()


def whole_shards(folder: Path, kind: str) -> int:
    """How many shards lie there without a gap."""
    count = 0
    while (folder / f"{kind}-{count:04d}.json").exists():
        count += 1
    return count


@lru_cache(maxsize=32)
def _opened(stem: Path) -> tuple[list[Any], Any]:
    check_safetensors(stem.with_suffix(".safetensors"))
    steps = read_json(stem.with_suffix(".json"), "A shard of boundaries")["steps"]
    return steps, safe_open(stem.with_suffix(".safetensors"), framework="pt")


def read_step(folder: Path, kind: str, step: int) -> tuple[Boundary, Tensor]:
    """Step number `step` of an interval, and its noise levels."""
    steps, tensors = _opened(folder / f"{kind}-{step // STEPS_PER_SHARD:04d}")
    content = _restore(steps[step % STEPS_PER_SHARD], tensors.get_tensor)
    sigmas = content.pop("sigmas")
    return Boundary(**content), sigmas


def read_batch(folders: list[Path], kind: str, step: int) -> BoundaryBatch:
    """That step of each interval."""
    found = [read_step(folder, kind, step) for folder in folders]
    return BoundaryBatch([boundary for boundary, _ in found], found[0][1])


def heldout_batches(folders: list[Path], count: int) -> Iterator[BoundaryBatch]:
    return (read_batch(folders, HELD_OUT, step) for step in range(count))
