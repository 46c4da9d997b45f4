"""The plugs that a run needs: trained students and projectors, checked against the run's teacher, and removals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ppcl.artifacts.plan import Interval, plug_name, projector_name, removal_name
from ppcl.artifacts.plugs import Plug, Projector, load_plugs, load_projectors
from ppcl.context import Run
from ppcl.errors import UsageError


@dataclass
class Plugs:
    """Everything that can be plugged into a run's teacher, by name.

    `students`: trained blocks that replace intervals.
    `projectors`: linear maps that replace text streams and FFNs.
    `removals`: intervals (stack, (u, v)) that are cut to their first block without training. A run with `distill=none`
        has these in place of students.
    """

    students: dict[str, Plug] = field(default_factory=dict)
    projectors: dict[str, Projector] = field(default_factory=dict)
    removals: dict[str, tuple[str, Interval]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of all plugs."""
        return [*self.students, *self.removals, *self.projectors]

    def interval(self, name: str) -> tuple[str, Interval]:
        """Return stack and interval of a student or a removal."""
        return (
            self.removals[name] if name in self.removals else (self.students[name].stack, self.students[name].interval)
        )

    def fingerprints(self, names: Iterable[str]) -> dict[str, str]:
        """Return the fingerprints of the students and projectors among `names`."""
        every = self.students | self.projectors
        return {name: every[name].header.fingerprint for name in names if name not in self.removals}


def _check_teacher(run: Run, plugs: dict[str, Any]) -> None:
    for name, plug in plugs.items():
        if plug.header.made_from["model"] != run.teacher.identity:
            raise UsageError(
                f"plug {name} in {run.folder / 'plugs'} was distilled from another teacher than "
                f"model.path={run.config.model.path}: give this run another name=."
            )


def required_removals(run: Run) -> dict[str, tuple[str, Interval]]:
    """Return all intervals of this run as removals, by name, with `distill=none`; nothing otherwise."""
    if run.config.distill.mode != "none":
        return {}
    return {removal_name(stack, pair): (stack, pair) for stack, pairs in run.intervals.items() for pair in pairs}


def student_names(run: Run) -> list[str]:
    """Return the names of the students of this run's intervals, whether they are trained or not."""
    return [plug_name(stack, pair) for stack, pairs in run.intervals.items() for pair in pairs]


def projector_names(run: Run) -> list[str]:
    """Return the names of the projectors of this run's width sets, whether they are trained or not."""
    return [
        projector_name(stack, index, kind)
        for stack, sets in run.width.items()
        for kind, indices in sets.items()
        for index in indices
    ]


def required_students(run: Run) -> dict[str, Plug]:
    """Return the trained student of every interval of this run, by name; nothing with `distill=none`.

    Raises `UsageError` if one is missing or was distilled from another teacher.
    """
    if run.config.distill.mode == "none":
        return {}
    plugs = load_plugs(run.plugs_folder)
    names = student_names(run)
    missing = [name for name in names if name not in plugs]
    if missing:
        raise UsageError(f"{run.folder / 'plugs'} has no student for {', '.join(missing)}; run 'stages=[depth]' first.")
    found = {name: plugs[name] for name in names}
    _check_teacher(run, found)
    return found


def required_projectors(run: Run, further: Iterable[str] = ()) -> dict[str, Projector]:
    """Return the trained projectors of this run's width sets, and those named in `further`, by name.

    Raises `UsageError` if one is missing, or was fitted to another teacher or in a student that this run does not have.
    """
    names = [*dict.fromkeys([*projector_names(run), *further])]
    found = load_projectors(run.plugs_folder) if names else {}
    missing = [name for name in names if name not in found]
    if missing:
        raise UsageError(f"{run.folder / 'plugs'} has no projector {', '.join(missing)}; run 'stages=[width]' first.")
    chosen = {name: item for name, item in found.items() if name in names}
    _check_teacher(run, chosen)
    for name, item in chosen.items():
        in_removal = item.base is not None and item.base.endswith(".removed")
        if item.base is not None and in_removal != (run.config.distill.mode == "none"):
            mode = run.config.distill.mode
            raise UsageError(
                f"projector {name} in {run.plugs_folder} was fitted in {item.base}, which distill.mode={mode} does not "
                "have: use width=none, or a run of its own, without paths.base_run, with 'stages=[width]'."
            )
    return chosen


def required_plugs(run: Run) -> Plugs:
    """Return all plugs of this run; raises `UsageError` if one is missing."""
    return Plugs(required_students(run), required_projectors(run), required_removals(run))
