"""Lists the files of a saved model or of pictures with their checksums, and compares them before they are used."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ppcl.artifacts.files import check_safetensors
from ppcl.errors import UsageError

_CHUNK = 1 << 24  # bytes read at a time
_THREADS = 4  # of which each reads a file
# The model card is completed later, and the others are records, of which one holds the list itself.
_UNLISTED = ("README.md", "ppcl.json", "manifest.json", "unfinished.json")


def list_files(folder: Path) -> dict[str, Any]:
    """Return the entry of a record that lists every file in `folder`: `{"files": {path: [bytes, CRC-32]}}`."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in _UNLISTED)
    paths = [path for path in found if not path.name.startswith(".")]
    with ThreadPoolExecutor(_THREADS) as pool:
        checksums = list(pool.map(_checksum, paths))
    sizes = [path.stat().st_size for path in paths]
    names = [path.relative_to(folder).as_posix() for path in paths]
    return {"files": {name: [size, found] for name, size, found in zip(names, sizes, checksums, strict=True)}}


def check_model(folder: Path, record: Mapping[str, Any], stage: str) -> None:
    """Raise `UsageError` if a file of the model in `folder` is missing or differs from the list in its `record`.

    `stage`: the stage that makes the model. Records of earlier versions have no list; then only the headers of
    safetensors files are read.
    """
    remedy = f"delete {folder} and run 'stages=[{stage}]' again"
    if "files" not in record:
        weights = sorted(folder.rglob("*.safetensors"))
        if not any(path.parent.name == "transformer" for path in weights):
            raise UsageError(f"{folder / 'transformer'} holds no weights: {remedy}.")
        for path in weights:
            _check(path, remedy)
    check_files(folder, record, remedy)


def check_files(folder: Path, record: Mapping[str, Any], remedy: str) -> None:
    """Raise `UsageError`, which ends with `remedy`, if a file that `record` lists is missing in `folder` or differs.

    Records of earlier versions list none.
    """
    listed = record.get("files", {})
    for name, (size, _) in listed.items():  # first what costs nothing
        path = folder / name
        if not path.is_file():
            raise UsageError(f"{path} does not exist: {remedy}.")
        if path.stat().st_size != size:
            raise UsageError(f"{path} has changed since it was written: {remedy}.")
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(_checksum, [folder / name for name in listed])
        for (name, (_, wanted)), checksum in zip(listed.items(), found, strict=True):
            if checksum != wanted:
                raise UsageError(f"{folder / name} has changed since it was written: {remedy}.")


def _check(path: Path, remedy: str) -> None:
    try:
        check_safetensors(path)
    except UsageError:
        raise UsageError(f"{path} is truncated or not a safetensors file: {remedy}.") from None


def _checksum(path: Path) -> str:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"
