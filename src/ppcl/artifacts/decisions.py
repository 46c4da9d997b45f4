"""How a method learned which blocks stay: `plan/decisions.json` of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from ppcl.artifacts.files import write_json


@dataclass(frozen=True)
class GroupDecisions:
    """The probability that each block of a group stays, over the steps of a training.

    `stack`, `blocks`: which blocks they are. `keep`: how many of them stay.
    `probabilities`: for each of the steps, that of each block. `confidence`: for each of the steps, the probability of
        the likeliest choice.
    """

    stack: str
    blocks: list[int]
    keep: int
    probabilities: list[list[float]]
    confidence: list[float]


@dataclass(frozen=True)
class Decisions:
    """The decisions of all groups, by their names, after each of `steps`."""

    steps: list[int]
    groups: dict[str, GroupDecisions]

    def save(self, path: Path) -> None:
        """Write the file."""
        write_json(path, {"format": "ppcl.decisions", **asdict(self)})
