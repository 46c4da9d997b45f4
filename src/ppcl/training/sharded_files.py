"""Reads sharded checkpoints of torch without running code from them.

torch writes a checkpoint's list of contents, `.metadata`, as a pickle, and reads it with an unpickler that calls
whatever the file names. It reads entries that are no tensors in the same way. Here only objects of the classes that
torch writes are made.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from ppcl.errors import UsageError

_METADATA = ".metadata"
# What torch writes to `.metadata`, by module.
_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},
}


class _Unknown(pickle.UnpicklingError):
    """A checkpoint holds what torch does not write."""


class _Unpickler(pickle.Unpickler):
    """Makes objects of the classes in `_KNOWN` alone."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module, ()):
            raise _Unknown(f"{module}.{name}, which could run code")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Reads a checkpoint's files by a list of contents that was read already."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class _Planner(DefaultLoadPlanner):
    """Reads entries that are no tensors, such as learning rates, as torch reads a file that is not trusted."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        content = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), content)  # of known classes alone, so it may be read again
        content.seek(0)
        super().load_bytes(read_item, content)


def load_sharded(state: dict[str, Any], folder: Path, *, partial: bool = False) -> None:
    """Fill `state` with what the checkpoint in `folder` holds, each rank with its own shards. All ranks must call this.

    `partial`: whether tensors that the checkpoint lacks keep their values.

    Raises `UsageError` for a checkpoint that is damaged, or that holds more than tensors and settings.
    """
    advice = f"delete {folder.parent} to train anew"
    try:
        with (folder / _METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise _Unknown("no list of contents")
    except _Unknown as error:
        raise UsageError(f"{folder / _METADATA} holds {error}: it is not read; {advice}.") from None
    except Exception as error:  # an unpickler raises almost anything for a damaged file
        raise UsageError(f"{folder / _METADATA} is damaged or missing ({type(error).__name__}): {advice}.") from None
    try:
        load(state, storage_reader=_Reader(folder, metadata), planner=_Planner(allow_partial_load=partial))
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if any(isinstance(cause, pickle.UnpicklingError) for cause in causes):
            raise UsageError(f"{folder} holds more than tensors and settings: it is not read; {advice}.") from None
        raise UsageError(f"{folder} is damaged ({type(causes[0]).__name__}): {advice}.") from None
