"""Prompts that an earlier recording has: a file of prompts that was changed costs what has changed in it alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ppcl.artifacts.headers import Header, first_difference
from ppcl.data.recording.files import (
    JOINING,
    RECORD,
    copy_calls,
    read_header,
    read_joining,
    row_in,
    write_joining,
)
from ppcl.data.recording.table import Row
from ppcl.errors import UsageError


def take_over(folder: Path, header: Header, rows: Sequence[Row], missing: Collection[int], *, joins: bool) -> set[int]:
    """Copy `missing` prompts into `folder` from the recordings beside it, and return the numbers of those copied.

    A recording is used if it is of the same model and was drawn in the same way; a prompt if it has the same row and
    number there, which gives it the same noise. What is damaged is passed over. `joins`: whether to copy how calls are
    joined, too, as the first prompt shows it.
    """
    identities = {prompt: rows[prompt].identity for prompt in {*missing, 0}}
    found = set[int]()
    for other in _alike(folder, header):
        if joins and not (folder / JOINING).exists() and row_in(other, 0) == identities[0]:
            with suppress(UsageError):
                write_joining(folder, read_joining(other))
        for prompt in sorted({*missing} - found):
            if row_in(other, prompt) == identities[prompt]:
                with suppress(UsageError):
                    copy_calls(other, folder, prompt, header.fingerprint)
                    found.add(prompt)
    return found


def _alike(folder: Path, header: Header) -> Iterator[Path]:
    """Yield the folders of recordings beside `folder` that differ in their prompts alone."""
    for other in sorted(folder.parent.iterdir()):
        if other == folder or not (other / RECORD).is_file():
            continue
        with suppress(UsageError):
            theirs = read_header(other).made_from | {"prompts": header.made_from["prompts"]}
            if first_difference(theirs, header.made_from) == "nothing":
                yield other
