"""Measured costs and savings of every plug of a run. Importing this loads no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.headers import Header
from ppcl.errors import UsageError


@dataclass
class Unit:
    """Something that can be plugged in or not: a student, a text projector, an FFN projector.

    `savings` by measure (`params`, `memory_gb`, `latency_ratio`) and `costs` by kind (`velocity`, `loss`)
    are those of plugging it in beside the units it `needs`, all of which a choice must hold too.
    """

    name: str
    needs: list[str] = field(default_factory=list)
    savings: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)


@dataclass
class Overlap:
    """Savings that two units have in common: a block's text FFN goes with either of them."""

    names: tuple[str, str]
    savings: dict[str, float] = field(default_factory=dict)


@dataclass
class Point:
    """One choice of plugs on the frontier of size and error.

    Blocks, parameters and `velocity_error` are counted and measured, the rest is predicted. Ratios are to the teacher;
    `memory_gb` is the peak of one forward.
    """

    plugged: list[str]
    num_layers: int
    params: int
    params_ratio: float
    latency_ratio: float
    memory_gb: float
    predicted: float
    velocity_error: float


@dataclass
class TeacherCost:
    """Parameters of the teacher, the peak memory of its forward, and the time of that."""

    params: int
    memory_gb: float
    latency_ms: float


Frontier = dict[str, list[Point]]  # by the kind of cost that it was planned with


@dataclass
class Costs:
    """`plan/costs.json`: what every plug costs and saves, and the frontier under each kind of cost."""

    header: Header
    teacher: TeacherCost
    units: list[Unit]
    overlaps: list[Overlap]
    frontier: Frontier

    def save(self, path: Path) -> None:
        body = {
            "teacher": asdict(self.teacher),
            "units": [asdict(unit) for unit in self.units],
            "overlaps": [asdict(overlap) for overlap in self.overlaps],
            "frontier": {cost: [asdict(point) for point in points] for cost, points in self.frontier.items()},
        }
        write_json(path, self.header.to_json() | body)

    @classmethod
    def load(cls, path: Path) -> Costs:
        content = read_json(path, "The costs")
        try:
            return cls(
                Header(content["format"], content["made_from"], content["version"]),
                TeacherCost(**content["teacher"]),
                [Unit(**unit) for unit in content["units"]],
                [Overlap(tuple(pair["names"]), pair["savings"]) for pair in content["overlaps"]],
                {cost: [Point(**point) for point in points] for cost, points in content["frontier"].items()},
            )
        except (KeyError, TypeError):
            raise UsageError(
                f"{path} does not read as measured costs: delete it and run 'stages=[plan]' again."
            ) from None
