"""Writes files completely or not at all. Importing this loads no torch.

The JSON record of an artifact is always written last, so if it exists, the artifact is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ppcl.errors import UsageError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file beside `path`.

    When the `with` block succeeds, the file is flushed to disk and renamed to `path`; otherwise it is deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, which replaces `folder` when the `with` block succeeds.

    First it deletes temporary folders that a killed process has left.
    """
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy where the file system has no links. An existing file stays.

    This is for files that are never changed in place.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        pass
    except OSError:
        with atomic_path(target) as temporary:
            shutil.copy2(source, temporary)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the JSON object in `path`; `UsageError` if there is none. `what` names the file in the sentence."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{what} {path} does not exist.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, IsADirectoryError):
        raise UsageError(f"{what} {path} is not a JSON file.") from None
    if not isinstance(content, dict):
        raise UsageError(f"{what} {path} does not hold a JSON object.")
    return content


def check_safetensors(path: Path, key: str = "") -> None:
    """Raise `UsageError` if `path` is missing, truncated or not a safetensors file; reads its header only.

    `key` starts the sentence.
    """
    try:
        with safe_open(path, framework="np"):  # which loads no torch
            pass
    except FileNotFoundError:
        raise UsageError(f"{key}{path} does not exist.") from None
    except SafetensorError:
        raise UsageError(
            f"{key}{path} is truncated or not a safetensors file; fetch it again, or delete it and run its stage again."
        ) from None
