"""`plan/costs.json`: measured costs and savings of every plug of a run. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.headers import Header
from ppcl.errors import UsageError

COSTS = ("velocity", "loss")  # kinds of cost


@dataclass
class Unit:
    """A plug that the planner can choose: a student, a text projector or an FFN projector.

    `needs`: units that a choice must contain if it contains this one.
    `savings`: what this unit saves in addition to the units it needs, by measure (`params`, `memory_gb`,
        `latency_ratio`).
    `costs`: the error that it adds to them, by kind (`velocity`, `loss`).
    """

    name: str
    needs: list[str] = field(default_factory=list)
    savings: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)


@dataclass
class Overlap:
    """Savings that two units share and that must be counted once.

    Example: a block's text FFN is removed by its text projector and by its FFN projector.
    """

    names: tuple[str, str]
    savings: dict[str, float] = field(default_factory=dict)


@dataclass
class Point:
    """One choice of plugs on the frontier of size and error.

    `num_layers` and `params` are counted, `velocity_error` is measured, all other numbers are predicted. Ratios are
    relative to the teacher. `memory_gb` is the peak memory of one forward, `predicted` the sum of the units' costs.
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
    """The teacher's parameters, and the peak memory and time of one forward."""

    params: int
    memory_gb: float
    latency_ms: float


def set_name(names: Iterable[str]) -> str:
    """Return the name of a set of plugs in `Costs.errors`."""
    return " ".join(sorted(names))


Frontier = dict[str, list[Point]]  # keys are kinds of cost (`velocity`, `loss`)


@dataclass
class Costs:
    """Costs and savings of every plug, and the frontier of choices for each kind of cost.

    `errors`: the velocity error of every set of plugs that was measured, by its names, see `set_name`.
    """

    header: Header
    teacher: TeacherCost
    units: list[Unit]
    overlaps: list[Overlap]
    frontier: Frontier
    errors: dict[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        body = {
            "teacher": asdict(self.teacher),
            "units": [asdict(unit) for unit in self.units],
            "overlaps": [asdict(overlap) for overlap in self.overlaps],
            "frontier": {cost: [asdict(point) for point in points] for cost, points in self.frontier.items()},
            "errors": [
                {"plugged": names.split(), "velocity_error": error} for names, error in self.errors.items() if names
            ],
        }
        write_json(path, self.header.to_json() | body)

    @classmethod
    def load(cls, path: Path) -> Costs:
        content = read_json(path, "The costs", "plan")
        try:
            return cls(
                Header(content["format"], content["made_from"], content["version"]),
                TeacherCost(**content["teacher"]),
                [Unit(**unit) for unit in content["units"]],
                [Overlap(tuple(pair["names"]), pair["savings"]) for pair in content["overlaps"]],
                {cost: [Point(**point) for point in points] for cost, points in content["frontier"].items()},
                {set_name(each["plugged"]): each["velocity_error"] for each in content.get("errors", [])},
            )
        except (KeyError, TypeError):
            raise UsageError(
                f"{path} does not read as measured costs: delete it and run 'stages=[plan]' again."
            ) from None
