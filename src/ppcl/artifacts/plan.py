"""The pruning plan (intervals and width sets), the names of plugs, and a chosen set of plugs. Loads no torch."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.headers import Header, is_current
from ppcl.errors import UsageError

Interval = tuple[int, int]  # [u, v], inclusive, 0-based: one block replaces the teacher's blocks u to v

Intervals = dict[str, list[Interval]]  # by stack

# By stack: the teacher's indices of the blocks that lose their `text` stream, and of those that lose their `ffn`.
Width = dict[str, dict[str, list[int]]]


@dataclass
class PruningPlan:
    """Runs of adjacent blocks that become one student block each, and the scores that led to this choice.

    `num_layers` is the number of the teacher's blocks per stack. `made_from` is what the fingerprint is made of.

    The file is plain JSON. A hand-written one needs `family`, `num_layers` and `intervals` only.
    """

    family: str
    num_layers: dict[str, int]
    intervals: Intervals
    made_from: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    width: Width = field(default_factory=dict)

    def header(self) -> Header:
        return Header("ppcl.plan", self.made_from)

    @property
    def is_counted(self) -> bool:
        """Whether `stages=[plan]` has counted it from given intervals: the configuration alone makes it again."""
        return {"family", "arch", "intervals"} <= self.made_from.keys()

    def is_current(self, path: Path, advice: str, stage: str) -> bool:
        """Return whether `path` holds this plan, which `stage` makes; one that was only counted may be replaced.

        Raises `UsageError`, which ends with `advice`, where another plan lies there that was detected or written by
        hand.
        """
        if path.exists() and (found := PruningPlan.load(path, stage=stage)).is_counted:
            return found.header().fingerprint == self.header().fingerprint
        return is_current(path, self.header(), advice)

    def save(self, path: Path) -> None:
        body = asdict(self)
        del body["made_from"]
        write_json(path, self.header().to_json() | body)

    @classmethod
    def load(cls, path: Path, key: str = "", stage: str = "detect") -> PruningPlan:
        """Read a plan of a run, which `stage` has made; with `key`, the override that names it, one edited by hand."""
        content = read_json(path, f"{key}the pruning plan" if key else "The pruning plan", stage, edited=bool(key))
        try:
            intervals = {
                stack: [(_whole(u), _whole(v)) for u, v in pairs] for stack, pairs in content["intervals"].items()
            }
            width = {
                stack: {kind: [_whole(index) for index in sets.get(kind, [])] for kind in ("text", "ffn")}
                for stack, sets in content.get("width", {}).items()
            }
            return cls(
                family=str(content["family"]),
                num_layers={stack: _whole(count) for stack, count in content["num_layers"].items()},
                intervals=intervals,
                made_from=content.get("made_from", {}),
                parameters=content.get("parameters", {}),
                scores=content.get("scores", {}),
                width=width,
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UsageError(
                f"{key}{path} is not a pruning plan: it needs family, num_layers, intervals {{stack: [[u, v], ...]}}, "
                "in whole numbers."
            ) from None


def _whole(value: Any) -> int:
    """Return a number of a JSON file; `ValueError` if it is not whole, since 1.7 is no block."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(value)
    return value


def plug_name(stack: str, interval: Interval) -> str:
    """Return the name of an interval in files, logs and calls, such as `transformer_blocks.3-5`."""
    return f"{stack}.{interval[0]}-{interval[1]}"


def removal_name(stack: str, interval: Interval) -> str:
    """Return the name of an interval that is cut to its first block, such as `transformer_blocks.3-5.removed`.

    That block stays the teacher's; there is no student.
    """
    return f"{plug_name(stack, interval)}.removed"


def projector_name(stack: str, index: int, kind: str) -> str:
    """Return the name of a block's projectors, such as `transformer_blocks.37.text` or `transformer_blocks.2.ffn`."""
    return f"{stack}.{index}.{kind}"


def read_plug_name(name: str) -> tuple[str, Interval] | None:
    """Return the stack and interval in a `plug_name`, or None for other names.

    The name of a stack may contain dots and numbers.
    """
    found = re.fullmatch(r"(.+)\.(\d+)-(\d+)", name)
    return (found[1], (int(found[2]), int(found[3]))) if found else None


def read_projector_name(name: str) -> tuple[str, int, str] | None:
    """Return the stack, block and kind in a `projector_name`, or None for other names."""
    found = re.fullmatch(r"(.+)\.(\d+)\.(text|ffn)", name)
    return (found[1], int(found[2]), found[3]) if found else None


@dataclass
class Choice:
    """The plugs that the planner has chosen for a budget, with the predicted size and error.

    `budget` is the key of the budget (such as `params`), its value, and the kind of cost that was minimised (`velocity`
    or `loss`). `plugged` are names of students, removals and projectors. A hand-written file needs these two only.
    `predicted_error` is the sum of what each plug adds alone, `measured_error` the velocity error of all together.
    """

    budget: tuple[str, float, str]
    plugged: list[str]
    params: int | None = None
    params_ratio: float | None = None
    latency_ratio: float | None = None
    memory_gb: float | None = None
    predicted_error: float | None = None
    measured_error: float | None = None

    def save(self, path: Path) -> None:
        write_json(path, {"format": "ppcl.choice", **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Choice:
        content = read_json(path, "The plan's choice", "plan")
        try:
            name, value, cost = content["budget"]
            rest = {item.name: content.get(item.name) for item in fields(cls)[2:]}
            return cls((name, value, cost), list(content["plugged"]), **rest)
        except (KeyError, TypeError, ValueError):
            raise UsageError(f"{path} is not the choice of a plan: run 'stages=[plan]' with a budget again.") from None
