"""Choose the set of plugs that saves enough at the least cost in quality.

`choose` takes costs and savings to be additive, except for pairs of plugs whose savings overlap. The choice is then a
knapsack problem with precedence constraints, which is solved exactly as a 0/1 linear programme. Errors are not quite
additive: plugs that each add little may add much together. `rescored` therefore measures sets of plugs as it goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from ppcl.artifacts.costs import COSTS, Overlap, Unit

NUM_POINTS = 16  # of the frontier


def num_measured(students: int, projectors: int, rescored: int) -> int:
    """Return how many sets of plugs are measured at most.

    These are each plug, of a projector also what it needs, the frontier of each kind of cost, and `rescored` sets that
    are measured on the way to the budget.
    """
    return students + 2 * projectors + len(COSTS) * NUM_POINTS + rescored


def total_saving(units: Sequence[Unit], overlaps: Sequence[Overlap], names: Iterable[str], measure: str) -> float:
    """Return what the units `names` save together. `measure`: `params`, `memory_gb` or `latency_ratio`."""
    chosen = set(names)
    saved = sum(unit.savings[measure] for unit in units if unit.name in chosen)
    return saved - sum(overlap.savings[measure] for overlap in overlaps if chosen.issuperset(overlap.names))


def closure(units: Sequence[Unit], names: Iterable[str]) -> set[str]:
    """Return `names` and everything that they need, directly or indirectly."""
    needs = {unit.name: unit.needs for unit in units}
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += needs[name]
    return found


def _solve(
    units: Sequence[Unit], overlaps: Sequence[Overlap], measure: str, objective: np.ndarray, saving: float | None
) -> set[str] | None:
    """Return the set of units with the least sum of `objective` that saves at least `saving`, or None if there is none.

    The set contains everything that its units need. `objective`: an entry for each unit, then one for each overlap.
    `saving`: None if nothing has to be saved.
    """
    index = {unit.name: number for number, unit in enumerate(units)}
    # A variable for each unit, then one for each overlap, which is 1 if both of its units are chosen.
    size = len(units) + len(overlaps)
    constraints = []

    def constrain(weights: dict[int, float], least: float) -> None:
        row = np.zeros(size)
        row[list(weights)] = list(weights.values())
        constraints.append(LinearConstraint(row, lb=least))

    for unit in units:
        for need in unit.needs:
            constrain({index[need]: 1, index[unit.name]: -1}, 0)  # x_unit <= x_need
    for number, overlap in enumerate(overlaps, start=len(units)):
        first, second = (index[name] for name in overlap.names)
        constrain({number: 1, first: -1, second: -1}, -1)  # both: x_first + x_second - 1 <= x_pair
        constrain({number: -1, first: 1}, 0)
        constrain({number: -1, second: 1}, 0)
    if saving is not None:
        saved = _savings(units, overlaps, measure)
        scale = np.abs(saved).max()
        constraints.append(LinearConstraint(saved / scale, lb=saving / scale * (1 - 1e-12)))
    found = milp(
        objective,
        constraints=constraints,
        bounds=Bounds(0, 1),
        integrality=np.ones(size),
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        return None
    return {unit.name for unit, taken in zip(units, found.x[: len(units)] > 0.5, strict=True) if taken}


def _savings(units: Sequence[Unit], overlaps: Sequence[Overlap], measure: str) -> np.ndarray:
    return np.array([item.savings[measure] for item in units] + [-item.savings[measure] for item in overlaps])


def greatest_saving(units: Sequence[Unit], measure: str, overlaps: Sequence[Overlap] = ()) -> float:
    """Return the largest saving of any choice. That is not always all units: a measured saving can be negative."""
    if not units:
        return 0.0
    saved = _savings(units, overlaps, measure)
    best = _solve(units, overlaps, measure, -saved / max(np.abs(saved).max(), 1e-300), None)
    return total_saving(units, overlaps, best or (), measure)


def choose(
    units: Sequence[Unit], measure: str, saving: float, cost: str, overlaps: Sequence[Overlap] = ()
) -> list[str] | None:
    """Return the names of the cheapest units that save at least `saving`, in order; None if no choice saves enough.

    A unit whose measured cost is 0, or negative by noise, is chosen only if its saving is needed.
    """
    if saving <= 0 or not units:
        return [] if saving <= 0 else None
    costs = np.maximum([unit.costs[cost] for unit in units], 0.0)
    objective = np.concatenate([costs / max(costs.max(), 1e-300), np.zeros(len(overlaps))])
    chosen = _solve(units, overlaps, measure, objective, saving)
    if chosen is None:
        return None
    free = [unit for unit in units if unit.name in chosen and unit.costs[cost] <= 0]
    for unit in sorted(free, key=lambda unit: unit.savings[measure]):
        rest = chosen - {unit.name}
        needed = any(unit.name in other.needs for other in units if other.name in rest)
        if not needed and total_saving(units, overlaps, rest, measure) >= saving * (1 - 1e-12):
            chosen = rest
    return [unit.name for unit in units if unit.name in chosen]


class _Measured:
    """The errors of sets of units: measured for at most `most` new sets, else estimated by the sum of single costs.

    `measure`: returns the error of a set of names; `known`: the sets that it has measured before.
    """

    def __init__(self, measure: Callable[[set[str]], float], known: Collection[frozenset[str]], most: int) -> None:
        self.measure, self.left = measure, most
        self.known = {*known}

    def __call__(self, names: Iterable[str]) -> float | None:
        """Return the error of a set; None if it is not known, and no more may be measured."""
        key = frozenset(names)
        if key not in self.known:
            if not self.left:
                return None
            self.left -= 1
            self.known.add(key)
        return self.measure({*key})


def rescored(
    units: Sequence[Unit],
    measure: str,
    saving: float,
    cost: str,
    overlaps: Sequence[Overlap],
    error: Callable[[set[str]], float],
    most: int,
    known: Collection[frozenset[str]] = (),
) -> list[str] | None:
    """Return names of units that save at least `saving`, chosen by the error that they have together.

    Units go in one after another, those first that add the least error for what they save. What a unit adds is measured
    again only when it is about to be chosen, since what it adds to few units hardly ever falls with more (a lazy greedy
    search). In the end units go out again that are not needed. The result of `choose` is returned if its error is less.

    `error`: measures the error of a set of names. `most`: new sets that may be measured; once they are used up, the
    sums of what was measured last decide. `known`: sets that cost no measurement. None is returned, or nothing chosen,
    where `choose` does so.
    """
    found = choose(units, measure, saving, cost, overlaps)
    if not found:
        return found
    measured = _Measured(error, known, most)
    least = measured(found)
    chosen = _greedy(units, measure, saving, cost, overlaps, measured)
    if chosen is None or least is None:
        return found
    chosen = _without_needless(units, measure, saving, overlaps, chosen, measured)
    reached = measured(chosen)
    if reached is None or reached >= least:
        return found
    return [unit.name for unit in units if unit.name in chosen]


def _greedy(
    units: Sequence[Unit],
    measure: str,
    saving: float,
    cost: str,
    overlaps: Sequence[Overlap],
    measured: _Measured,
) -> set[str] | None:
    """Return units that save at least `saving`, added one by one; None if no unit saves more."""
    costs = {unit.name: max(unit.costs[cost], 0.0) for unit in units}
    chosen: set[str] = set()
    here, saved = 0.0, 0.0
    while saved < saving * (1 - 1e-12):
        added = {name: closure(units, [name]) - chosen for name in costs if name not in chosen}
        gains = {
            name: min(total_saving(units, overlaps, chosen | more, measure), saving) - saved
            for name, more in added.items()
        }
        rates = {name: sum(costs[each] for each in added[name]) / gains[name] for name in added if gains[name] > 0}
        if not rates:
            return None
        fresh: set[str] = set()
        while (best := min(rates, key=lambda name: rates[name])) not in fresh:
            found = measured(chosen | added[best])
            if found is None:
                break
            fresh.add(best)
            rise = max(found - here, 0.0)
            rates[best] = rise / gains[best]
            if len(added[best]) == 1:
                costs[best] = rise
        chosen |= added[best]
        here = measured(chosen) or here
        saved = total_saving(units, overlaps, chosen, measure)
    return chosen


def _without_needless(
    units: Sequence[Unit],
    measure: str,
    saving: float,
    overlaps: Sequence[Overlap],
    chosen: set[str],
    measured: _Measured,
) -> set[str]:
    """Return `chosen` without units that are not needed for `saving`, as long as that lowers the error."""
    while True:
        smaller: list[tuple[float, set[str]]] = []
        for name in sorted(chosen):
            rest = {other for other in chosen if name not in closure(units, [other])}
            if total_saving(units, overlaps, rest, measure) >= saving * (1 - 1e-12):
                found = measured(rest)
                smaller.append((math.inf if found is None else found, rest))
        here = measured(chosen)
        if not smaller or here is None:
            return chosen
        least, rest = min(smaller, key=lambda pair: pair[0])
        if least >= here:
            return chosen
        chosen = rest


def frontier(
    units: Sequence[Unit], measure: str, cost: str, num_points: int, overlaps: Sequence[Overlap] = ()
) -> list[list[str]]:
    """Return the best choices for `num_points` savings, in equal steps from none to all of it, without repetitions."""
    everything = total_saving(units, overlaps, [unit.name for unit in units], measure)
    choices: list[list[str]] = []
    for point in range(num_points):
        choice = choose(units, measure, everything * point / max(1, num_points - 1) * (1 - 1e-9), cost, overlaps)
        if choice is not None and choice not in choices:
            choices.append(choice)
    return choices
