"""Checks that a disk has room for what is about to be written."""

from __future__ import annotations

import shutil
from pathlib import Path

from ppcl.errors import UsageError
from ppcl.report.text import in_bytes

_MARGIN = 1.05  # the estimated size times this must be free


def check_space(folder: Path, needed: float, what: str, remedy: str, *, place: str | None = None) -> str:
    """Return a sentence with the estimated size of `what`, `needed` bytes, and the space on the disk of `folder`.

    Raises `UsageError` if the disk has less than `needed` and 5% more free. That sentence ends with `remedy`, and names
    `place`, or the folder if that is None. The folder need not exist yet.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed * _MARGIN > free:
        raise UsageError(
            f"{place or folder} has {in_bytes(free)} free, and {what} take about {in_bytes(needed)}: {remedy}."
        )
    return f"about {in_bytes(needed)} for {what}; {in_bytes(free)} are free"
