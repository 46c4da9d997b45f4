"""Reads and atomically writes safetensors files. A checksum of every tensor is stored, and compared when it is read.

The checksums are CRC-32, which takes half a second a GB on one core. Files of earlier versions have none, and are read
as they are.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ppcl.artifacts.files import CHECKSUM, again, atomic_path, check_safetensors, parse_json
from ppcl.errors import UsageError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with these metadata and a checksum of every tensor."""
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    checksums = json.dumps({key: _checksum(value) for key, value in plain.items()}, sort_keys=True)
    with atomic_path(path) as temporary:
        save_file(plain, temporary, {**metadata, CHECKSUM: checksums})
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in the header of a safetensors file in place; the library writes them in a random order."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(written) == length:  # unless a name was escaped in another way
            file.seek(8)
            file.write(written)


def _checksum(tensor: Tensor) -> str:
    """Return the checksum of a contiguous tensor in host memory, 8 hex digits; dtype and shape count, too."""
    start = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    values: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(values, start):08x}"


class TensorFile:
    """An open safetensors file. Each tensor is checked when it is first read.

    `stage`: the stage that makes the file, for error messages.
    `fingerprint`: what the metadata must have as `fingerprint`. None: anything.
    `metadata`: the file's metadata, without the checksums.

    Raises `UsageError` if the file is missing, damaged, or belongs to other settings; `get_tensor` raises it for a
    tensor that has changed since it was written.
    """

    def __init__(self, path: Path, stage: str = "", fingerprint: str | None = None) -> None:
        check_safetensors(path, stage=stage)
        self.path, self.stage = path, stage
        self._file: Any = safe_open(path, framework="pt").__enter__()
        self.metadata: dict[str, str] = dict(self._file.metadata() or {})
        earlier = CHECKSUM not in self.metadata  # files of earlier versions may lack a fingerprint, too
        self._left: dict[str, str] = self._checksums(self.metadata.pop(CHECKSUM, "{}"))
        found = self.metadata.get("fingerprint", fingerprint if earlier else "")
        if fingerprint is not None and found != fingerprint:
            raise UsageError(f"{path} belongs to a run with other settings: {again(stage)}.")

    def _checksums(self, text: str) -> dict[str, str]:
        try:
            return dict(parse_json(text))
        except ValueError:
            raise self._changed() from None

    def _changed(self) -> UsageError:
        return UsageError(f"{self.path} has changed since it was written: {again(self.stage)}.")

    def keys(self) -> list[str]:
        """Return the names of the tensors."""
        return list(self._file.keys())

    def get_tensor(self, name: str) -> Tensor:
        """Return a tensor; raises `UsageError` if there is none of this name, or if it has changed."""
        try:
            tensor = self._file.get_tensor(name)
        except Exception:  # safetensors raises its own kind
            raise self._changed() from None
        wanted = self._left.pop(name, None)
        if wanted is not None and wanted != _checksum(tensor):
            raise self._changed()
        return tensor


def read_tensors(
    path: Path, stage: str = "", fingerprint: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and metadata of a safetensors file; takes and raises the same as `TensorFile`."""
    file = TensorFile(path, stage, fingerprint)
    if missing := file._left.keys() - set(file.keys()):
        raise UsageError(f"{path} lacks {min(missing)}: {again(stage)}.")
    return {key: file.get_tensor(key) for key in file.keys()}, file.metadata  # noqa: SIM118
