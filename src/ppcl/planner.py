"""Chooses what to plug in under a budget: the cheapest set of plugs that saves enough (plug and play).

Costs and savings of plugs are taken as additive, so the choice is a knapsack with precedences: a 0/1
linear programme, solved exactly. What it predicts is measured afterwards, by whoever asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp


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


def closure(units: Sequence[Unit], names: Iterable[str]) -> set[str]:
    """`names` with everything they need, directly or not."""
    needs = {unit.name: unit.needs for unit in units}
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += needs[name]
    return found


def choose(units: Sequence[Unit], measure: str, saving: float, cost: str) -> list[str] | None:
    """The names, in order, whose costs sum to the least and whose savings to `saving` or more; None if none do.

    Units that cost nothing by the measurement (its noise may even be negative) are taken for the smallest
    of costs, so that none goes in without need.
    """
    if saving <= 0 or not units:
        return [] if saving <= 0 else None
    index = {unit.name: number for number, unit in enumerate(units)}
    saved = np.array([unit.savings[measure] for unit in units])
    costs = np.array([unit.costs[cost] for unit in units])
    positive = costs[costs > 0]
    costs = np.maximum(costs, 1e-6 * positive.min() if positive.size else 1.0)
    scale = np.abs(saved).max()
    constraints = [LinearConstraint(saved / scale, lb=saving / scale * (1 - 1e-12))]
    for unit in units:
        for need in unit.needs:  # x_unit <= x_need
            row = np.zeros(len(units))
            row[index[need]], row[index[unit.name]] = 1, -1
            constraints.append(LinearConstraint(row, lb=0))
    found = milp(costs / costs.max(), constraints=constraints, bounds=Bounds(0, 1), integrality=np.ones(len(units)))
    if found.x is None:
        return None
    return [unit.name for unit, taken in zip(units, found.x > 0.5, strict=True) if taken]


def frontier(units: Sequence[Unit], measure: str, cost: str, num_points: int) -> list[list[str]]:
    """Choices for savings from nothing to everything in equal steps, each once."""
    everything = sum(unit.savings[measure] for unit in units)
    choices: list[list[str]] = []
    for point in range(num_points):
        choice = choose(units, measure, everything * point / max(1, num_points - 1) * (1 - 1e-9), cost)
        if choice is not None and choice not in choices:
            choices.append(choice)
    return choices
