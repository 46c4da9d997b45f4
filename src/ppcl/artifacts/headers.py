"""Headers of artifacts: what each was made from, and the fingerprint of that. Importing this loads no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl.artifacts.files import again, read_json
from ppcl.errors import UsageError

FORMAT_VERSION = 1

ADVICE = "give this run another name=, or delete that file to make it anew"

# The stage that makes an artifact or a checkpoint, by the format that its record names.
MAKERS = {
    "ppcl.teacher": "pretrain",
    "ppcl.cache": "cache",
    "ppcl.recording": "cache",
    "ppcl.probes": "probe",
    "ppcl.plan": "detect",
    "ppcl.boundaries": "boundaries",
    "ppcl.plug": "depth",
    "ppcl.depth": "depth",
    "ppcl.projector": "width",
    "ppcl.width": "width",
    "ppcl.costs": "plan",
    "ppcl.finetuned": "finetune",
    "ppcl.velocities": "finetune",
    "ppcl.export": "export",
    "ppcl.quantized": "quantize",
    "ppcl.lora": "remap_lora",
    "ppcl.images": "generate",
    "ppcl.scores": "evaluate",
}


def fingerprint(made_from: Mapping[str, Any]) -> str:
    """Return a hash, 16 hex digits, of the JSON form of `made_from`; the order of its keys does not matter."""
    canonical = json.dumps(made_from, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass
class Header:
    """The first keys of every artifact's JSON file: its format, and everything that it was made from.

    `made_from` holds the settings and the fingerprints of other artifacts that the content depends on. Two artifacts
    with the same header have the same content.
    """

    format: str
    made_from: dict[str, Any]
    version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        return fingerprint({"format": self.format, "version": self.version, "made_from": self.made_from})

    @property
    def stage(self) -> str:
        """The stage that makes this kind of artifact; empty if its format is not in `MAKERS`."""
        return MAKERS.get(self.format, "")

    @classmethod
    def of(cls, content: Mapping[str, Any], path: Path, stage: str) -> Header:
        """Return the header in an artifact's JSON `content`, read from `path`; `UsageError` if it has none."""
        try:
            return cls(str(content["format"]), dict(content["made_from"]), content["version"])
        except (KeyError, TypeError, ValueError):
            raise UsageError(f"{path} does not say what it was made from: {again(stage)}.") from None

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "made_from": self.made_from,
        }


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    """Name the first key whose values differ in two `made_from`, with both values: `distill.steps=6, now 12`.

    Values are compared in their JSON form, as files hold them: a tuple equals the list of its items. A key that one of
    them lacks is `unset` there. Returns `nothing` where all are equal.
    """
    before, after = (json.loads(json.dumps(values, default=str)) for values in (old, new))
    for key in sorted({*before, *after}, key=lambda key: (key != "rule", key)):  # a rule brings its own settings
        was, now = before.get(key), after.get(key)
        if was != now:
            if isinstance(was, dict) and isinstance(now, dict):
                return first_difference(was, now, f"{prefix}{key}.")
            words = (repr(values[key]) if key in values else "unset" for values in (before, after))
            return f"{prefix}{key}={', now '.join(words)}"
    return "nothing"


def is_current(path: Path, header: Header, advice: str | None = None, files: Iterable[Path] = ()) -> bool:
    """Return whether the artifact whose JSON file is `path` exists and has this header, and all its `files` exist.

    Raises `UsageError` where it exists with another header, since only the user may replace it. The sentence
    ends with `advice`, what to do instead: by default, to choose another name or to delete that file.
    """
    if not path.exists():
        return False
    found = read_json(path, "The record", header.stage)
    if found.get("fingerprint") == header.fingerprint:
        return all(file.exists() for file in files)
    difference = first_difference(found.get("made_from", {}), header.made_from)
    if re.search(r"(weights|encoders)='[0-9a-f]{16}', now '[0-9a-f]{32}'$", difference):
        difference += " (an earlier version looked at parts of the files alone, so they may be another model's)"
    raise UsageError(f"{path} was made with {difference}: {advice or ADVICE}.")
