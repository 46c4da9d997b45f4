"""Digests of the whole content of large files. A file is read once; after that its digest is remembered.

A record in a folder keeps the digest of each file with the file's size and times of change. A file with other ones is
read again. Weights in safetensors files are checked on the way: numbers that are not finite are refused.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.model_files import PICKLED, Stored, pickled_tensors, read_header
from ppcl.errors import UsageError
from ppcl.progress import counter

_PIECE = 32 << 20  # bytes that a thread reads and hashes at once
_MOST_THREADS = 8
_WIDEST = 8  # bytes of the largest number in a file
_RECENT = 2_000_000_000  # nanoseconds; a file may change again within them and keep its time of change
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_buffers = threading.local()  # one buffer a thread


def digests(files: Sequence[Path], memory: Path, console: Console) -> list[str]:
    """Return a hash of the whole content of each of `files`, 32 hex digits, in their order.

    `memory`: the folder with what is remembered of earlier calls. Files that are not remembered are read, by several
    threads, with a progress bar on `console`.

    Raises `UsageError` if a file changes while it is read, is a damaged file of weights, or has a weight that is NaN or
    infinite. Such a file is not remembered.
    """
    states = {file: _state(file) for file in files}
    found = {file: _remembered(_record(memory, file), state) for file, state in states.items()}
    unknown = [file for file, digest in found.items() if digest is None]
    if not unknown:
        return [str(found[file]) for file in files]
    start = time.time_ns()
    pieces = {file: -(-states[file]["size"] // _PIECE) for file in unknown}
    size = sum(states[file]["size"] for file in unknown)
    label = f"reading {size / 1e9:.1f} GB of weights, once"
    with (
        counter(label, sum(pieces.values()), console=console) as advance,
        ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="digests") as threads,
    ):
        for file in unknown:
            checks = _Finite(file)
            hashed = hashlib.sha256()
            for digest in threads.map(partial(_piece, file, checks), range(pieces[file])):
                hashed.update(digest)
                advance(1)
            if file.suffix in PICKLED:
                _check_pickled(file)
            found[file] = hashed.hexdigest()[:32]
            if _state(file) != states[file]:
                raise UsageError(f"{file} was changed while it was read: wait until it is complete.")
            if states[file]["changed"] + _RECENT < start:
                with suppress(OSError):  # a cache that cannot be written to costs time only
                    write_json(_record(memory, file), {**states[file], "digest": found[file]})
    return [str(found[file]) for file in files]


def _state(file: Path) -> dict[str, Any]:
    """Return what tells that a file is unchanged: its path without links, its size, and its times of change in ns."""
    try:
        status = file.stat()
    except FileNotFoundError:
        raise UsageError(f"{file} does not exist.") from None
    times = {"modified": status.st_mtime_ns, "changed": max(status.st_mtime_ns, status.st_ctime_ns)}
    return {"path": str(file.resolve()), "size": status.st_size, **times}


def _record(memory: Path, file: Path) -> Path:
    return memory / f"{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}.json"


def _remembered(record: Path, state: dict[str, Any]) -> str | None:
    try:
        content = read_json(record, "The record of a file")
        digest = content.pop("digest")
    except (OSError, UsageError, KeyError):  # it is made again
        return None
    return digest if content == state and isinstance(digest, str) and len(digest) == 32 else None


def _piece(file: Path, checks: _Finite, number: int) -> bytes:
    """Read piece `number` of a file, check the numbers that begin in it, and return its hash."""
    if not hasattr(_buffers, "piece"):
        _buffers.piece = bytearray(_PIECE + _WIDEST)
    view, place = memoryview(_buffers.piece), number * _PIECE
    count = 0
    with file.open("rb", buffering=0) as handle:
        while count < len(view) and (more := os.preadv(handle.fileno(), [view[count:]], place + count)):
            count += more
    checks(view[:count], place)
    return hashlib.sha256(view[: min(count, _PIECE)]).digest()


class _Finite:
    """Checks that the weights in pieces of a safetensors file are finite. Files of other kinds have none to check."""

    def __init__(self, file: Path) -> None:
        self.file = file
        stored = read_header(file).items() if file.suffix == ".safetensors" else ()
        self.tensors = sorted(
            ((each.start, name, each) for name, each in stored if each.dtype in _DTYPES and each.numel),
            key=lambda item: item[0],
        )
        self.starts = [start for start, _, _ in self.tensors]

    def __call__(self, piece: memoryview, place: int) -> None:
        """Raise `UsageError` for a number that is not finite and begins in the first `_PIECE` bytes of `piece`.

        `place`: the offset in the file at which `piece` begins.
        """
        end = place + min(len(piece), _PIECE)
        for number in range(max(0, bisect_right(self.starts, place) - 1), len(self.tensors)):
            start, name, stored = self.tensors[number]
            if start >= end:
                return
            values = _within(stored, piece, place, end)
            if values is not None and not _is_finite(values):
                raise _not_finite(self.file, name)


def _within(stored: Stored, piece: memoryview, place: int, end: int) -> Tensor | None:
    """Return the elements of a stored tensor that begin between the offsets `place` and `end`; None if none does."""
    dtype = _DTYPES[stored.dtype]
    size = dtype.itemsize
    first = max(0, -(-(place - stored.start) // size))
    last = min(stored.numel, -(-(end - stored.start) // size))
    if last <= first:
        return None
    return torch.frombuffer(piece, dtype=dtype, count=last - first, offset=stored.start + first * size - place)


def _is_finite(values: Tensor) -> bool:
    """Whether all values are finite. Their sum tells, at the speed of memory, unless it overflows."""
    if values.dtype.itemsize == 1:
        values = values.float()
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def _check_pickled(file: Path) -> None:
    """Raise `UsageError` if a `.bin` file is damaged, or has a weight that is not finite."""
    for name, value in pickled_tensors(file).items():
        if value.is_floating_point() and not _is_finite(value):
            raise _not_finite(file, name)


def _not_finite(file: Path, name: str) -> UsageError:
    return UsageError(
        f"{file} has NaN or infinite numbers in {name}: they would spoil everything that is made of this model, so "
        "fetch it again, or save it again in bfloat16 or float32."
    )


def joined(parts: Iterable[str]) -> str:
    """Return one hash for several digests or lines, 32 hex digits; their order matters."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
