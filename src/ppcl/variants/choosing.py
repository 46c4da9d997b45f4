"""Choose the plugs for a budget, from measured costs and from errors that are measured as the choice grows."""

from __future__ import annotations

from functools import cached_property

from ppcl.artifacts.costs import Costs, set_name
from ppcl.context import Run
from ppcl.variants.costs import ErrorMeter
from ppcl.variants.planner import choose, rescored
from ppcl.variants.plugs import Plugs
from ppcl.variants.switch import Switch


class _Errors:
    """The velocity errors of sets of plugs. The model is loaded when the first one has to be measured."""

    def __init__(self, run: Run, plugs: Plugs, known: dict[str, float]) -> None:
        self.run, self.plugs, self.known = run, plugs, known

    @cached_property
    def _switch(self) -> Switch:
        return Switch(self.run, self.plugs)

    @cached_property
    def _meter(self) -> ErrorMeter:
        return ErrorMeter(self.run, self._switch.board, self.known)

    def __call__(self, names: set[str]) -> float:
        key = set_name(names)
        return self.known[key] if key in self.known else self._meter.error(names)

    def restore(self) -> None:
        """Turn the pipeline back into the teacher's, if anything was measured."""
        if "_switch" in vars(self):
            self._switch.restore()


def chosen(run: Run, plugs: Plugs, costs: Costs, measure: str, saving: float) -> tuple[list[str] | None, float | None]:
    """Return the plugs that save at least `saving`, None if no choice does, and their measured velocity error.

    `measure`: `params`, `memory_gb` or `latency_ratio`. With `budget.cost=velocity` up to `budget.rescored` sets are
    measured, and kept in `costs.errors`. The error is None if it was not measured.
    """
    budget, units, overlaps = run.config.budget, costs.units, costs.overlaps
    if budget.cost != "velocity" or not budget.rescored:
        found = choose(units, measure, saving, budget.cost, overlaps)
    else:
        errors = _Errors(run, plugs, costs.errors)
        known = [frozenset(name.split()) for name in costs.errors]
        most = budget.rescored
        found = rescored(units, measure, saving, budget.cost, overlaps, errors, most, known)
        errors.restore()
    return found, None if found is None else costs.errors.get(set_name(found))
