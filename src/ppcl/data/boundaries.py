"""Boundaries: a teacher's activations at the ends of intervals, stored on disk to train students without the teacher.

Each interval [u, v] has a folder. It holds the student's initial weights, `init.safetensors`, and shards of
`STEPS_PER_SHARD` batches each. A shard is a JSON file and a safetensors file: the JSON gives the arguments of block u
and the outputs of block v, with tensors by their names in the safetensors file. A tensor that is the same in every
batch, such as rotary embeddings, is stored once per shard.

Where the next interval begins at v + 1, the outputs of block v are its inputs. They are in a file of their own,
`KIND-NNNN-end.safetensors`, of which the next interval's folder has a hard link, `KIND-NNNN-start.safetensors`. Each
folder is complete when it is copied alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from ppcl.artifacts.files import again, link_or_copy, read_json, write_json
from ppcl.artifacts.tensors import TensorFile, write_tensors
from ppcl.errors import UsageError
from ppcl.ops.losses import Average, own
from ppcl.taps import Streams

STEPS_PER_SHARD = 8
TRAIN, HELD_OUT = "train", "heldout"


@dataclass
class Boundary:
    """One batch at one interval [u, v].

    `kwargs`: the keyword arguments of block u.
    `outputs`: the output streams of block v, `[B, tokens, D]`.
    `masks`: the valid tokens of each stream, `[B, tokens]`; None for all.
    `inputs`: those inputs of the whole forward that the family needs to find streams in a block's output.
    """

    kwargs: dict[str, Any]
    outputs: Streams
    masks: dict[str, Tensor | None]
    inputs: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> Boundary:
        """Return a copy with all tensors on `device`."""
        return Boundary(**move_data_to_device(vars(self), device))


@dataclass
class BoundaryBatch:
    """The same batch at several intervals, and its noise levels `sigmas` `[B]`."""

    parts: list[Boundary]
    sigmas: Tensor

    @property
    def average(self) -> Average:
        """The function that averages a number over ranks, as in `TrainingBatch`; ranks do not share boundaries."""
        return own

    def average_of(self, stream: str) -> Average:
        """The same for every stream: a step is one batch of boundaries."""
        return own

    def to(self, device: torch.device) -> BoundaryBatch:
        """Return the batch on `device`. Without this method, Lightning would copy every field even if it is there."""
        if self.sigmas.device == device:
            return self
        return BoundaryBatch([part.to(device) for part in self.parts], self.sigmas.to(device))


def _describe(value: Any, keep: Callable[[str, Tensor], dict[str, str]], path: str = "") -> Any:
    """Return `value` as JSON, with each tensor replaced by file and name, `{FILE: NAME}`, as `keep(path, tensor)` says.

    Raises `TypeError` for a type that is not supported.
    """
    if isinstance(value, Tensor) and value.dtype == torch.complex128:  # safetensors has no such type
        return {"complex": keep(path, torch.view_as_real(value.resolve_conj()))}
    if isinstance(value, Tensor):
        return keep(path, value)
    if isinstance(value, Mapping):
        return {"dict": {str(key): _describe(item, keep, f"{path}/{key}") for key, item in value.items()}}
    if isinstance(value, list | tuple):
        items = [_describe(item, keep, f"{path}/{number}") for number, item in enumerate(value)]
        return {type(value).__name__: items}
    if value is None or isinstance(value, bool | int | float | str):
        return {"plain": value}
    raise TypeError(f"a block was called with a {type(value).__name__}, which boundaries cannot store")


def _restore(described: Any, files: Mapping[str, Any]) -> Any:
    """Return the value that `_describe` described, with tensors from open `files`."""
    ((kind, value),) = described.items()
    if kind in files:
        return files[kind].get_tensor(value)
    if kind == "complex":
        return torch.view_as_complex(_restore(value, files))
    if kind == "dict":
        return {key: _restore(item, files) for key, item in value.items()}
    if kind in ("list", "tuple"):
        items = [_restore(item, files) for item in value]
        return items if kind == "list" else tuple(items)
    return value


class BoundaryWriter:
    """Collects the batches of one interval and writes them in shards to `folder`. `kind`: `train` or `heldout`.

    `fingerprint`: that of the boundaries' record, which every file names.
    `before`: the writer of the interval that ends where this one begins, if there is one. It must be given each batch
    first.
    """

    def __init__(self, folder: Path, kind: str, fingerprint: str, before: BoundaryWriter | None = None) -> None:
        self.folder, self.kind, self.before = folder, kind, before
        self.metadata = {"fingerprint": fingerprint}
        self.shard = 0
        self._own = {"tensor"}  # the files that this writes; one more if another interval begins where this one ends
        if before is not None:
            before._own.add("end")
            before._clear()
        self._ends: dict[int, dict[str, str]] = {}  # by the batch's number in its shard: each stream's name in `end`
        self._clear()

    def _clear(self) -> None:
        self._steps: list[Any] = []
        self._files: dict[str, dict[str, Tensor]] = {file: {} for file in self._own}
        self._latest: dict[str, str] = {}  # by path in the content: the name of the last tensor stored for it

    @property
    def pending_bytes(self) -> int:
        """The bytes of tensors that are not written yet."""
        return sum(tensor.nbytes for tensors in self._files.values() for tensor in tensors.values())

    def add(self, boundary: Boundary, sigmas: Tensor, shared: Mapping[str, str] | None = None) -> None:
        """Add the next batch, and write the shard if it is full.

        `shared`: arguments of block u that are output streams of the interval before, with the stream of each.
        """
        content = {**vars(boundary), "sigmas": sigmas}
        if not boundary.inputs:
            del content["inputs"]
        names: dict[tuple, dict[str, str]] = {}  # one tensor may occur twice: a mask is an argument and one of `masks`
        ends = self._ends[len(self._steps)] = {}

        def keep(path: str, tensor: Tensor) -> dict[str, str]:
            argument, stream = path.removeprefix("/kwargs/"), path.removeprefix("/outputs/")
            if self.before is not None and shared and argument in shared:
                return {"start": self.before._ends[len(self._steps)][shared[argument]]}
            if "end" in self._own and stream in boundary.outputs:
                ends[stream] = self._keep("end", path, tensor)
                return {"end": ends[stream]}
            place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
            if place not in names:
                names[place] = {"tensor": self._keep("tensor", path, tensor)}
            return names[place]

        self._steps.append(_describe(content, keep))
        if len(self._steps) == STEPS_PER_SHARD:
            self.flush()

    def _keep(self, file: str, path: str, tensor: Tensor) -> str:
        """Store a tensor and return its name; one equal to the last at the same `path` is not stored again."""
        plain, latest = tensor.detach().cpu().contiguous(), self._latest.get(path)
        if plain.untyped_storage().nbytes() > plain.nbytes:
            plain = plain.clone()  # store a view alone, without the rest of its storage
        if latest is not None:
            before = self._files[file][latest]
            if before.dtype == plain.dtype and torch.equal(before, plain):  # cheap: most tensors differ at once
                return latest
        name = self._latest[path] = f"{len(self._steps)}{path}"
        self._files[file][name] = plain
        return name

    def flush(self) -> None:
        """Write the batches that are not written yet as a shard, which may be shorter than others."""
        if self._steps:
            stem = self.folder / f"{self.kind}-{self.shard:04d}"
            if self.before is not None:
                link_or_copy(_file(self.before.folder / stem.name, "end"), _file(stem, "start"))
            for file, tensors in self._files.items():
                write_tensors(_file(stem, file), tensors, self.metadata)
            files = [*self._own, "start"] if self.before is not None else [*self._own]
            content = {"files": sorted(files), "steps": self._steps, **self.metadata}
            write_json(stem.with_suffix(".json"), content)  # last: it marks the shard as complete
        self.shard += 1
        self._clear()


def _file(stem: Path, file: str) -> Path:
    """Return the safetensors file of a shard that `_describe` calls `file`: `tensor`, `start` or `end`."""
    return stem.with_name(f"{stem.name}{'' if file == 'tensor' else f'-{file}'}.safetensors")


def whole_shards(folder: Path, kind: str) -> int:
    """Return the number of complete shards of `kind` in `folder`, up to the first that is missing.

    Raises `UsageError` for a shard's record that does not read.
    """
    count = 0
    while (record := folder / f"{kind}-{count:04d}.json").exists() and all(
        path.exists() for path in _files(record.with_suffix(""), _read_record(record, None)).values()
    ):
        count += 1
    return count


def _files(stem: Path, content: Mapping[str, Any]) -> dict[str, Path]:
    """Return the safetensors files of a shard, by the names that its record uses."""
    return {file: _file(stem, file) for file in content.get("files", ["tensor"])}


def _read_record(record: Path, fingerprint: str | None) -> dict[str, Any]:
    content = read_json(record, "A shard of boundaries", "boundaries")
    if fingerprint is not None and content.get("fingerprint", fingerprint) != fingerprint:
        raise UsageError(f"{record} belongs to a run with other settings: {again('boundaries')}.")
    return content


@lru_cache(maxsize=32)
def _opened(stem: Path, fingerprint: str | None) -> tuple[list[Any], dict[str, TensorFile]]:
    content = _read_record(stem.with_suffix(".json"), fingerprint)
    paths = _files(stem, content)
    return content["steps"], {file: TensorFile(path, "boundaries", fingerprint) for file, path in paths.items()}


def read_step(folder: Path, kind: str, step: int, fingerprint: str | None = None) -> tuple[Boundary, Tensor]:
    """Return batch number `step` of the interval stored in `folder`, and its noise levels `[B]`.

    `fingerprint`: that of the boundaries' record. None: it is not compared.
    """
    steps, files = _opened(folder / f"{kind}-{step // STEPS_PER_SHARD:04d}", fingerprint)
    content = _restore(steps[step % STEPS_PER_SHARD], files)
    sigmas = content.pop("sigmas")
    return Boundary(**content), sigmas


@dataclass
class BoundaryStream:
    """Returns the batch of several intervals by its step. After the last of the `stored` batches the first follows."""

    folders: list[Path]
    kind: str
    stored: int
    fingerprint: str | None = None

    def __call__(self, step: int) -> BoundaryBatch:
        found = [read_step(folder, self.kind, step % self.stored, self.fingerprint) for folder in self.folders]
        return BoundaryBatch([boundary for boundary, _ in found], found[0][1])
