"""The planner's choices against every subset there is."""

import itertools
import random

import pytest

from ppcl.artifacts.costs import Overlap, Unit
from ppcl.variants.planner import choose, closure, frontier, rescored, total_saving


def instance(seed, most=8):
    """Units in an order that respects what they need; some cost nothing or less, some save less than nothing."""
    draw = random.Random(seed)
    units = []
    for number in range(draw.randint(2, most)):
        needs = [unit.name for unit in units if draw.random() < 0.25]
        saving = -draw.uniform(0, 30) if draw.random() < 0.15 else draw.uniform(10, 100)
        cost = draw.choice([0.0, -draw.uniform(0, 0.2)]) if draw.random() < 0.25 else draw.uniform(0.01, 2)
        units.append(Unit(f"unit{number}", needs, {"params": saving}, {"velocity": cost}))
    return units


def overlapping(seed, units):
    """Pairs that save less together than apart, or by a measurement's noise a little more."""
    draw = random.Random(1000 + seed)
    names = [unit.name for unit in units]
    pairs = [tuple(names[number : number + 2]) for number in range(0, len(names) - 1, 2)]
    return [Overlap(pair, {"params": draw.uniform(-2, 9)}) for pair in pairs]


def feasible(units, saving, overlaps=()):
    """Every subset that holds what its members need and saves enough."""
    for bits in itertools.product((False, True), repeat=len(units)):
        chosen = [unit for unit, bit in zip(units, bits, strict=True) if bit]
        names = {unit.name for unit in chosen}
        if not all(names.issuperset(unit.needs) for unit in chosen):
            continue
        together = sum(overlap.savings["params"] for overlap in overlaps if names.issuperset(overlap.names))
        if saved(chosen) - together >= saving * (1 - 1e-12):
            yield chosen


def saved(units):
    return sum(unit.savings["params"] for unit in units)


def paid(units):
    """A measurement below zero is noise around it."""
    return sum(max(unit.costs["velocity"], 0.0) for unit in units)


def named(units, names):
    return [unit for unit in units if unit.name in names]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_no_subset_that_saves_enough_costs_less(seed, overlap):
    units = instance(seed)
    overlaps = overlapping(seed, units) if overlap else []
    everything = sum(unit.savings["params"] for unit in units if unit.savings["params"] > 0)
    for share in (0.05, 0.3, 0.6, 0.9, 1.0):
        found = choose(units, "params", everything * share, "velocity", overlaps)
        subsets = list(feasible(units, everything * share, overlaps))
        assert (found is None) == (not subsets)
        if found is None:
            continue
        chosen = named(units, found)
        assert found == [unit.name for unit in chosen]  # in the order of the units, each once
        assert closure(units, found) == set(found)
        assert total_saving(units, overlaps, found, "params") >= everything * share * (1 - 1e-12)
        assert paid(chosen) == pytest.approx(min(paid(subset) for subset in subsets), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_nothing_that_is_free_goes_in_without_need(seed):
    """Of the choices that cost the least, none with fewer units: what a measurement calls free is still a change."""
    units = instance(seed)
    saving = 0.4 * sum(unit.savings["params"] for unit in units if unit.savings["params"] > 0)
    found = choose(units, "params", saving, "velocity")
    subsets = list(feasible(units, saving))
    if not subsets:
        assert found is None
        return
    least = min(paid(subset) for subset in subsets)
    fewest = min(
        sum(unit.costs["velocity"] <= 0 for unit in subset) for subset in subsets if paid(subset) <= least + 1e-9
    )
    assert sum(unit.costs["velocity"] <= 0 for unit in named(units, found)) == fewest


def test_a_free_unit_stays_out_where_a_cheap_one_is_enough():
    units = [
        Unit("free", [], {"params": 1.0}, {"velocity": -0.1}),
        Unit("cheap", [], {"params": 5.0}, {"velocity": 1e-4}),
        Unit("dear", [], {"params": 50.0}, {"velocity": 1.0}),
    ]
    assert choose(units, "params", 5.0, "velocity") == ["cheap"]
    assert choose(units, "params", 50.0, "velocity") == ["dear"]
    assert choose(units, "params", 0.5, "velocity") == ["free"]


def test_a_budget_is_kept_to_the_last_parameter():
    units = [
        Unit("short", [], {"params": 1_000_000}, {"velocity": 1.0}),
        Unit("enough", [], {"params": 1_000_001}, {"velocity": 2.0}),
    ]
    assert choose(units, "params", 1_000_001, "velocity") == ["enough"]
    assert choose(units, "params", 1_000_000, "velocity") == ["short"]


def test_measure_and_cost_are_those_asked_for():
    units = [
        Unit("a", [], {"params": 10, "memory_gb": 1}, {"velocity": 1.0, "loss": 9.0}),
        Unit("b", [], {"params": 10, "memory_gb": 5}, {"velocity": 2.0, "loss": 1.0}),
    ]
    assert choose(units, "params", 10, "velocity") == ["a"]
    assert choose(units, "params", 10, "loss") == ["b"]
    assert choose(units, "memory_gb", 5, "velocity") == ["b"]


def test_a_unit_that_saves_less_than_nothing_goes_in_where_others_need_it():
    units = [
        Unit("base", [], {"params": -5}, {"velocity": 0.1}),
        Unit("projector", ["base"], {"params": 20}, {"velocity": 0.1}),
        Unit("dear", [], {"params": 15}, {"velocity": 9.0}),
    ]
    assert choose(units, "params", 15, "velocity") == ["base", "projector"]
    assert choose(units, "params", 30, "velocity") == ["base", "projector", "dear"]
    assert choose(units, "params", 31, "velocity") is None


@pytest.mark.parametrize("saving", [0, 0.0, -3.0])
def test_no_saving_needs_no_unit(saving):
    assert choose(instance(0), "params", saving, "velocity") == []
    assert choose([], "params", saving, "velocity") == []


def test_what_cannot_be_saved_is_none():
    units = instance(0)
    assert choose(units, "params", sum(abs(unit.savings["params"]) for unit in units) + 1, "velocity") is None
    assert choose([], "params", 1.0, "velocity") is None


def test_units_that_all_cost_nothing():
    """The fewest of them, where no cost tells them apart."""
    units = [Unit(f"unit{number}", [], {"params": size}, {"velocity": -0.1}) for number, size in enumerate((1, 5, 2))]
    assert choose(units, "params", 5, "velocity") == ["unit1"]
    assert choose(units, "params", 8, "velocity") == ["unit0", "unit1", "unit2"]


def test_what_two_units_save_twice_counts_once():
    units = [Unit(name, [], {"params": 10}, {"velocity": cost}) for name, cost in (("a", 1.0), ("b", 1.0), ("c", 1.5))]
    overlaps = [Overlap(("a", "b"), {"params": 4})]
    assert total_saving(units, overlaps, ["a"], "params") == 10
    assert total_saving(units, overlaps, ["a", "b"], "params") == 16
    assert choose(units, "params", 16, "velocity", overlaps) == ["a", "b"]
    assert choose(units, "params", 17, "velocity", overlaps) in (["a", "c"], ["b", "c"])
    assert choose(units, "params", 26, "velocity", overlaps) == ["a", "b", "c"]
    assert choose(units, "params", 27, "velocity", overlaps) is None


def test_closure_follows_needs_to_the_end():
    units = [Unit("a"), Unit("b", ["a"]), Unit("c", ["b"]), Unit("d"), Unit("e", ["a", "d"])]
    assert closure(units, []) == set()
    assert closure(units, ["a"]) == {"a"}
    assert closure(units, ["c"]) == {"a", "b", "c"}
    assert closure(units, ["c", "e"]) == {"a", "b", "c", "d", "e"}


@pytest.mark.parametrize("seed", range(8))
def test_the_frontier_saves_more_with_every_point(seed):
    units = [unit for unit in instance(seed) if unit.savings["params"] > 0]
    known = {unit.name for unit in units}
    units = [Unit(unit.name, [n for n in unit.needs if n in known], unit.savings, unit.costs) for unit in units]
    points = [named(units, names) for names in frontier(units, "params", "velocity", 9)]
    assert points[0] == []
    assert points[-1] == units
    assert 1 < len(points) <= 9
    assert all(saved(before) < saved(after) for before, after in itertools.pairwise(points))
    assert all(paid(before) <= paid(after) + 1e-9 for before, after in itertools.pairwise(points))
    for point in points:
        assert closure(units, [unit.name for unit in point]) == {unit.name for unit in point}


def test_a_frontier_of_nothing_is_the_teacher():
    assert frontier([], "params", "velocity", 4) == [[]]


class Together:
    """Measures sets of units, of which neighbours add more together than apart, and notes which it was asked for."""

    def __init__(self, units, extra):
        self.costs = {unit.name: max(unit.costs["velocity"], 0.0) for unit in units}
        self.extra, self.asked = extra, []

    def __call__(self, names):
        self.asked.append(frozenset(names))
        places = sorted(list(self.costs).index(name) for name in names)
        neighbours = sum(after - before == 1 for before, after in itertools.pairwise(places))
        return sum(self.costs[name] for name in names) + self.extra * neighbours


@pytest.mark.parametrize("most", [0, 1, 5, 1000])
@pytest.mark.parametrize("seed", range(20))
def test_rescoring_saves_enough_and_is_never_worse_than_the_sums(seed, most):
    units = instance(seed)
    overlaps = overlapping(seed, units)
    everything = sum(unit.savings["params"] for unit in units if unit.savings["params"] > 0)
    for share in (0.2, 0.6, 0.9):
        error = Together(units, 0.5)
        by_sums = choose(units, "params", everything * share, "velocity", overlaps)
        found = rescored(units, "params", everything * share, "velocity", overlaps, error, most)
        assert len(set(error.asked)) <= most
        assert (found is None) == (by_sums is None)
        if found:
            assert closure(units, found) == set(found)
            assert total_saving(units, overlaps, found, "params") >= everything * share * (1 - 1e-12)
            assert error(set(found)) <= error(set(by_sums))


def test_rescoring_leaves_out_units_that_are_dear_together():
    """By single costs the three neighbours are the cheapest."""
    units = [Unit(f"unit{n}", [], {"params": 10.0}, {"velocity": 1.0 + 0.1 * (n > 2)}) for n in range(6)]
    error = Together(units, 2.0)
    assert choose(units, "params", 30, "velocity") == ["unit0", "unit1", "unit2"]
    found = rescored(units, "params", 30, "velocity", [], error, 100)
    assert error(set(found)) == pytest.approx(3.1)  # no two are neighbours
    assert len(set(error.asked)) < 2**6 / 3


def test_what_was_measured_before_costs_no_measurement():
    units = [Unit(f"unit{n}", [], {"params": 10.0}, {"velocity": 1.0 + 0.1 * (n > 2)}) for n in range(6)]
    first = Together(units, 2.0)
    found = rescored(units, "params", 30, "velocity", [], first, 100)
    again = Together(units, 2.0)
    assert rescored(units, "params", 30, "velocity", [], again, 0, set(first.asked)) == found
