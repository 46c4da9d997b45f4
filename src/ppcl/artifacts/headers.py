"""Headers of artifacts: what each was made from, and the fingerprint of that. Importing this loads no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl.artifacts.files import read_json
from ppcl.errors import UsageError

FORMAT_VERSION = 1


def fingerprint(made_from: Mapping[str, Any]) -> str:
    """A short hash of the JSON form of what an artifact is made from."""
    canonical = json.dumps(made_from, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass
class Header:
    """The beginning of every artifact's JSON."""

    format: str
    made_from: dict[str, Any]
    version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        return fingerprint({"format": self.format, "version": self.version, "made_from": self.made_from})

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "made_from": self.made_from,
        }


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    """The first key in which two `made_from` differ, with both values."""
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if before != after:
            if isinstance(before, dict) and isinstance(after, dict):
                return first_difference(before, after, f"{prefix}{key}.")
            return f"{prefix}{key}={before!r}, now {after!r}"
    return "nothing"


def is_current(path: Path, header: Header, advice: str | None = None) -> bool:
    """Whether the artifact whose JSON is `path` exists and was made from just this.

    Raises `UsageError` where one exists that was made from something else: it is not ours to replace. The sentence ends
    with `advice`, by default to choose another name or to delete that file.
    """
    if not path.exists():
        return False
    found = read_json(path, header.format)
    if found.get("fingerprint") == header.fingerprint:
        return True
    asked = json.loads(json.dumps(header.made_from, default=str))  # as the file has it: lists in place of tuples
    raise UsageError(
        f"{path} was made with {first_difference(found.get('made_from', {}), asked)}: "
        f"{advice or 'give this run another name=, or delete that file to make it anew'}."
    )
