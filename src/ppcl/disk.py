"""Sizes in bytes: checks that a disk has room for what is about to be written."""

from __future__ import annotations

import shutil
from pathlib import Path

from ppcl.errors import UsageError

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


def in_bytes(size: float) -> str:
    """Return a size in bytes in the unit that fits: 812 -> `812 bytes`, 3.2e6 -> `3.20 MB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} bytes"
