"""A teacher's activations at the boundaries of intervals, on disk: all that a student needs of its teacher.

Per interval a folder with `init.safetensors`, what the student starts from, and shards of a few steps: a JSON that says
what block u was called with and what block v returned, and a safetensors file of the tensors it names. What is the
same in every step (rotations) lies in a shard once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from safetensors import safe_open
from torch import Tensor

from ppcl.artifacts.files import check_safetensors, read_json, write_json
from ppcl.artifacts.tensors import write_tensors
from ppcl.ops.losses import Average, own
from ppcl.taps import Streams

STEPS_PER_SHARD = 8
TRAIN, HELD_OUT = "train", "heldout"


@dataclass
class Boundary:
    """One call: block u's keyword arguments, block v's streams `[B, tokens, D]`, and which tokens count.

    `inputs`: what of the whole forward's inputs the family finds streams by, where it needs some.
    """

    kwargs: dict[str, Any]
    outputs: Streams
    masks: dict[str, Tensor | None]
    inputs: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> Boundary:
        return Boundary(**move_data_to_device(vars(self), device))


@dataclass
class BoundaryBatch:
    """The same step of several intervals; `sigmas` `[B]` as of any batch."""

    parts: list[Boundary]
    sigmas: Tensor

    @property
    def average(self) -> Average:
        """The mean over ranks, as in `TrainingBatch`; boundaries are not shared among ranks."""
        return own

    def to(self, device: torch.device) -> BoundaryBatch:
        """Lightning would copy the whole, field by field."""
        if self.sigmas.device == device:
            return self
        return BoundaryBatch([part.to(device) for part in self.parts], self.sigmas.to(device))


def _describe(value: Any, keep: Callable[[str, Tensor], str], path: str = "") -> Any:
    """`value` as JSON, its tensors named by `keep(path, tensor)`."""
    if isinstance(value, Tensor):
        return {"tensor": keep(path, value)}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _describe(item, keep, f"{path}/{key}") for key, item in value.items()}}
    if isinstance(value, list | tuple):
        items = [_describe(item, keep, f"{path}/{number}") for number, item in enumerate(value)]
        return {type(value).__name__: items}
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
        self._latest: dict[str, str] = {}  # by path, the name of its tensor in the last step

    @property
    def pending_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def add(self, boundary: Boundary, sigmas: Tensor) -> None:
        content = {**vars(boundary), "sigmas": sigmas}
        if not boundary.inputs:
            del content["inputs"]
        names: dict[tuple, str] = {}  # a mask is both an argument and one of the masks

        def keep(path: str, tensor: Tensor) -> str:
            place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
            if place not in names:
                names[place] = self._keep(path, tensor)
            return names[place]

        self._steps.append(_describe(content, keep))
        if len(self._steps) == STEPS_PER_SHARD:
            self.flush()

    def _keep(self, path: str, tensor: Tensor) -> str:
        plain, latest = tensor.detach().cpu().contiguous(), self._latest.get(path)
        if plain.untyped_storage().nbytes() > plain.nbytes:
            plain = plain.clone()  # of a view, not what it is a view of
        if latest is not None:
            before = self._tensors[latest]
            if before.dtype == plain.dtype and torch.equal(before, plain):  # seldom looks further than at a few numbers
                return latest
        name = self._latest[path] = f"{len(self._steps)}{path}"
        self._tensors[name] = plain
        return name

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


@dataclass
class BoundaryStream:
    """The batches of several intervals by step; those beyond the `stored` ones begin them again."""

    folders: list[Path]
    kind: str
    stored: int
    from_disk = True

    def __call__(self, step: int) -> BoundaryBatch:
        found = [read_step(folder, self.kind, step % self.stored) for folder in self.folders]
        return BoundaryBatch([boundary for boundary, _ in found], found[0][1])
