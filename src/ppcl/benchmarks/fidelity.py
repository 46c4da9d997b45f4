"""The benchmark of any model: how near every variant is to the teacher, on the prompts of the benchmark `none`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ppcl.benchmarks.none import Unscored


@dataclass(kw_only=True)
class AgainstTeacher(Unscored):
    """Compares pictures with the teacher's from equal prompts and seeds, and velocities by noise level."""

    compares = True

    @property
    def made_from(self) -> dict[str, Any]:
        """Return that of the benchmark `none`. Both draw the same pictures, so each can use the other's."""
        return super().made_from | {"name": "none"}
