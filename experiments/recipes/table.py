"""Tables of measured rows, as CSV files that several processes can extend at the same time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from experiments.common import read_csv, write_csv
from ppcl.artifacts.files import atomic_path


def as_text(value: Any) -> str:
    """Return a value as the file has it: None is empty, floats have six digits."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


Row = Mapping[str, str]
_Row = TypeVar("_Row", bound=Row)


def select(rows: Iterable[_Row], **facts: Any) -> list[_Row]:
    """Return the rows that have these values."""
    wanted = {key: as_text(value) for key, value in facts.items()}
    return [row for row in rows if wanted.items() <= row.items()]


@dataclass(frozen=True)
class Table:
    """A CSV file with `columns`. `keys` are the columns that tell rows apart."""

    path: Path
    columns: Sequence[str]
    keys: Sequence[str]

    @property
    def rows(self) -> list[dict[str, str]]:
        """All rows as they are in the file now. All values are strings."""
        return read_csv(self.path) if self.path.exists() else []

    def find(self, **facts: Any) -> dict[str, str] | None:
        """Return the last row that has these values."""
        return next(reversed(select(self.rows, **facts)), None)

    def add(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Write a row at once, in the place of the one with the same keys if there is one; return it as text."""
        unknown = row.keys() - {*self.columns}
        assert not unknown, unknown
        new = {name: as_text(row.get(name)) for name in self.columns}
        with self._locked():
            rows = [old for old in self.rows if any(old[key] != new[key] for key in self.keys)]
            with atomic_path(self.path) as temporary:
                write_csv(temporary, [*({name: old.get(name, "") for name in self.columns} for old in rows), new])
        return new

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
