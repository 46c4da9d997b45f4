"""Writes files completely or not at all, and checks them when they are read. Importing this loads no torch.

The JSON record of an artifact is always written last, so if it exists, the artifact is complete. Every JSON file of
ours holds a checksum of its content, so that a file that was changed or damaged later is not used.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
import re
import shutil
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ppcl.errors import UsageError

CHECKSUM = "crc32"  # the key of the checksum, in JSON files and in the metadata of safetensors files

_FOREIGN = 24 * 3600.0  # seconds after which a temporary file of another machine counts as left behind
_numbers = count()


def temporary_path(path: Path) -> Path:
    """Return a new name for a temporary file or folder beside `path`.

    It names machine and process, so that `sweep` can tell what a killed process has left from what is being written.
    """
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{next(_numbers)}.tmp")


def sweep(folder: Path, pattern: str = "*", *, deep: bool = False) -> None:
    """Delete temporary files and folders in `folder` that a killed process has left. Those of live processes stay.

    `pattern`: the name of the file that was to be written. `deep`: whether to look into all folders below, too.
    """
    for place, folders, files in os.walk(folder):
        for name in fnmatch.filter([*folders, *files], f".{pattern}.tmp"):
            path = Path(place) / name
            if name in folders:
                folders.remove(name)
            if _is_left(path):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if not deep:
            return


def _is_left(path: Path) -> bool:
    """Return whether no process writes this temporary file any more."""
    found = re.search(r"\.([\w-]+)\.(\d+)\.\d+\.tmp$", path.name)
    earlier = re.search(r"\.(\d+)\.tmp$", path.name)  # of an earlier version, which did not name the machine
    try:
        if found is None and earlier is None:
            return False
        if found is not None and found[1] != _host():
            return time.time() - path.stat().st_mtime > _FOREIGN
        os.kill(int(found[2] if found else earlier[1]), 0)  # type: ignore[index]
    except ProcessLookupError:
        return True
    except OSError:  # already gone, or a live process of another user
        return False
    return False


def _host() -> str:
    return re.sub(r"[^\w-]", "", socket.gethostname())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file beside `path`.

    When the `with` block succeeds, the file is flushed to disk and renamed to `path`; otherwise it is deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
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
    before = temporary_path(folder)
    with temporary_folder(folder) as temporary:
        try:
            yield temporary
            if folder.exists():  # moved first: deleting takes time, in which another process could read it
                os.replace(folder, before)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(before, ignore_errors=True)


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, which is deleted when the `with` block ends.

    First it deletes those that a killed process has left.
    """
    sweep(folder.parent, f"{escape(folder.name)}.*")
    temporary = temporary_path(folder)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy where the file system has no links. It replaces `target`.

    This is for files that are never changed in place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target)
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:
        with atomic_path(target) as copy:
            shutil.copy2(source, copy)
    finally:
        temporary.unlink(missing_ok=True)  # still there if `target` was the same file before


def again(stage: str) -> str:
    """Return the remedy for a missing or damaged file that a stage makes, for an error message."""
    return f"delete it and run 'stages=[{stage}]' again" if stage else "fetch it again, or write it anew"


def write_json(path: Path, content: Mapping[str, Any], *, checked: bool = True) -> None:
    """Write a JSON file, all or nothing.

    `checked`: whether to add a checksum of the content, which `read_json` compares. Raises `UsageError`
    if a number in it is not finite, which JSON does not have.
    """
    check_finite(content, f"{path} is not written")
    found = {**content, CHECKSUM: _checksum(content)} if checked else content
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def check_finite(content: Any, start: str, key: str = "") -> None:
    """Raise `UsageError` for the first infinite number or NaN in nested mappings and lists, with its key.

    `start` begins the sentence. `key`: the key of `content` itself.
    """
    if isinstance(content, float) and not math.isfinite(content):
        raise UsageError(
            f"{start}: {key or 'a value'} is {content}; look for NaN and for values that overflow in the teacher's "
            "weights, in plugs and in the data."
        )
    if isinstance(content, Mapping):
        for name, value in content.items():
            check_finite(value, start, f"{key}.{name}" if key else str(name))
    elif isinstance(content, (list, tuple)):
        for number, value in enumerate(content):
            check_finite(value, start, f"{key}[{number}]")


class _NotFinite(Exception):  # noqa: N818 - it never leaves this module
    """`NaN` or `Infinity` in a file, which Python's JSON would read."""


def _refuse_constant(name: str) -> Any:
    raise _NotFinite(name)


def _checksum(content: Mapping[str, Any]) -> str:
    """Return the checksum of JSON content, 8 hex digits; the order of its keys does not matter."""
    plain = json.loads(json.dumps({key: value for key, value in content.items() if key != CHECKSUM}))
    return f"{zlib.crc32(json.dumps(plain, sort_keys=True).encode()):08x}"


def parse_json(text: str | bytes, **settings: Any) -> Any:
    """Return the content of a JSON text, read with these settings of `json.loads`.

    Raises `ValueError` if the text is no JSON, or is nested too deep for Python to read.
    """
    try:
        return json.loads(text, **settings)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path: Path, what: str, stage: str = "", *, edited: bool = False) -> dict[str, Any]:
    """Return the JSON object in `path`, without its checksum.

    `what` names the file in error messages, `stage` the stage that makes it. `edited`: whether the user may have edited
    the file. Raises `UsageError` if the file is missing, is no JSON object, or has changed since it was written.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        remedy = f": run 'stages=[{stage}]' again" if stage else ""
        raise UsageError(f"{what} {path} does not exist{remedy}.") from None
    except _NotFinite as error:
        raise UsageError(f"{what} {path} holds {error}, which is no number: {again(stage)}.") from None
    except (ValueError, IsADirectoryError):
        raise UsageError(f"{what} {path} is not a JSON file: {again(stage)}.") from None
    if not isinstance(content, dict):
        raise UsageError(f"{what} {path} does not hold a JSON object: {again(stage)}.")
    checksum = content.pop(CHECKSUM, None)  # files of earlier versions have none
    if checksum is not None and not edited and checksum != _checksum(content):
        raise UsageError(f"{what} {path} has changed since it was written: {again(stage)}.")
    return content


def with_checksum(text: str) -> str:
    """Return a YAML text below a first line, a comment, that holds a checksum of it."""
    return f"# {CHECKSUM} {zlib.crc32(text.encode()):08x}\n{text}"


def is_changed(text: str) -> bool:
    """Return whether a text from `with_checksum` has changed since. Without such a first line it has not."""
    found = re.match(rf"# {CHECKSUM} (\w*)\n?", text)
    return found is not None and found[1] != f"{zlib.crc32(text[found.end() :].encode()):08x}"


def check_safetensors(path: Path, key: str = "", stage: str = "") -> None:
    """Raise `UsageError` if `path` is missing, truncated or not a safetensors file; reads its header only.

    `key` starts the sentence. `stage` names the stage that makes the file.
    """
    try:
        with safe_open(path, framework="np"):  # which loads no torch
            pass
    except FileNotFoundError:
        remedy = f": run 'stages=[{stage}]' again" if stage else ""
        raise UsageError(f"{key}{path} does not exist{remedy}.") from None
    except SafetensorError:
        raise UsageError(f"{key}{path} is truncated or not a safetensors file; {again(stage)}.") from None
