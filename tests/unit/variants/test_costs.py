"""Which plugs need which, what a budget asks for, and how two costs compare."""

import pytest
import torch

from ppcl.artifacts.costs import Overlap, Point, TeacherCost, Unit
from ppcl.artifacts.headers import Header
from ppcl.artifacts.plugs import Plug, Projector
from ppcl.errors import UsageError
from ppcl.layers import Layout
from ppcl.surgery.depth import student_block
from ppcl.surgery.plugboard import Plugboard
from ppcl.variants.costs import compare_costs, find_units, target_of, velocity_error
from ppcl.variants.planner import closure, total_saving
from ppcl.variants.plugs import Plugs

STACK = "transformer_blocks"


def student(u, v):
    plug = Plug(Header("ppcl.plug", {}), STACK, {}, {"heldout_loss": 1.0}, (u, v))
    return plug.name, plug


def projector(index, kind, base=None, reference=None):
    item = Projector(Header("ppcl.projector", {}), STACK, {}, {"heldout_loss": 1.0}, index, kind, base, reference)
    return item.name, item


def needs_of(students, projectors):
    units = find_units(Plugs(dict(students), dict(projectors)))
    return {
        unit.name.removeprefix(f"{STACK}."): {need.removeprefix(f"{STACK}.") for need in unit.needs} for unit in units
    }


def test_students_and_projectors_of_teacher_blocks_need_nothing():
    needs = needs_of([student(1, 2), student(4, 6)], [projector(7, "ffn"), projector(9, "text", reference=8)])
    assert needs == {"1-2": set(), "4-6": set(), "7.ffn": set(), "9.text": set()}


def test_a_projector_needs_the_student_it_was_fitted_in():
    needs = needs_of([student(1, 2)], [projector(1, "ffn", base=f"{STACK}.1-2")])
    assert needs["1.ffn"] == {"1-2"}


def test_a_text_projector_needs_all_between_it_and_its_reference():
    """Its reference's student, students that shorten the way, and text projectors that make it the nearest intact."""
    students = [student(0, 1), student(3, 4), student(6, 7), student(9, 10)]
    projectors = [
        projector(5, "text", reference=3),
        projector(6, "text", base=f"{STACK}.6-7", reference=3),
        projector(8, "text", reference=3),
        projector(11, "text", reference=9),
    ]
    needs = needs_of(students, projectors)
    assert needs["5.text"] == {"3-4"}
    assert needs["6.text"] == {"6-7", "3-4", "5.text"}
    assert needs["8.text"] == {"3-4", "6-7", "5.text", "6.text"}
    assert needs["11.text"] == {"9-10"}


def arrangements(units):
    """Every closed set of units."""
    names = [unit.name for unit in units]
    for bits in range(1 << len(names)):
        chosen = {name for number, name in enumerate(names) if bits >> number & 1}
        if closure(units, chosen) == chosen:
            yield chosen


@pytest.mark.parametrize("text_output", ["last", "each"])
def test_savings_of_parameters_add_up_in_every_arrangement(family, make_transformer, text_output):
    """Each closed set saves what its units save beside what they need, less overlaps: a plan's count is the model's."""
    transformer = make_transformer(8)
    blocks = list(transformer.transformer_blocks)
    intervals = {STACK: [(1, 2), (4, 5)]}
    students = dict([student(1, 2), student(4, 5)])
    projectors = dict(
        [
            projector(3, "text", reference=1),
            projector(4, "text", base=f"{STACK}.4-5", reference=1),
            projector(3, "ffn"),
            projector(6, "ffn"),
            projector(7, "text", reference=6),
        ]
    )
    modules = {name: student_block(blocks, plug.interval, "first") for name, plug in students.items()}
    board = Plugboard(family, transformer, intervals, modules, projectors, Layout(text_output))
    units = find_units(Plugs(students, projectors))

    def size(names):
        board(*names)
        return sum(parameter.numel() for parameter in transformer.parameters())

    def saving(names, present):
        return size(present - set(names)) - size(present)

    for unit in units:
        unit.savings = {"params": saving([unit.name], closure(units, [unit.name]))}
        assert unit.savings["params"] > 0
    pair = f"{STACK}.3.text", f"{STACK}.3.ffn"  # the text's FFN goes with either
    alone = sum(unit.savings["params"] for unit in units if unit.name in pair)
    overlaps = [Overlap(pair, {"params": alone - saving(pair, closure(units, pair))})]
    assert overlaps[0].savings["params"] > 0
    teacher = size(())
    tried = list(arrangements(units))
    assert len(tried) > 20
    for names in tried:
        assert teacher - size(names) == total_saving(units, overlaps, names, "params"), names


def test_velocity_error_is_relative_to_the_teacher(make_transformer, make_batch):
    teacher, other = make_transformer(2), make_transformer(2, seed=1)
    batches = [make_batch(seed) for seed in range(2)]
    with torch.no_grad():
        targets = [teacher(**batch.inputs)[0] for batch in batches]
        outputs = [other(**batch.inputs)[0] for batch in batches]
    expected = sum((a - b).square().sum() for a, b in zip(outputs, targets, strict=True))
    expected = expected / sum(target.square().sum() for target in targets)
    assert velocity_error(teacher, batches, targets) == 0
    assert velocity_error(other, batches, targets) == pytest.approx(expected.item(), rel=1e-5)


TEACHER = TeacherCost(params=1000.0, memory_gb=4.0, latency_ms=10.0)
UNITS = [
    Unit("a", [], {"params": 300, "memory_gb": 1.2, "latency_ratio": 0.3}),
    Unit("b", [], {"params": 200, "memory_gb": 0.8, "latency_ratio": -0.01}),
]


@pytest.mark.parametrize(
    ("name", "value", "saving"),
    [
        ("params", 0.7, 300),
        ("params", 700, 300),
        ("params", 1, 0),
        ("params", 0.5, 500),
        ("params", 500, 500),
        ("memory_gb", 3.0, 1.0),
        ("memory_gb", 2.0, 2.0),
        ("latency_ratio", 0.9, 0.1),
        ("latency_ratio", 0.7, 0.3),
        ("params", 1001, -1),
        ("memory_gb", 5, -1.0),
        ("latency_ratio", 1.5, -0.5),
    ],
)
def test_a_budget_is_what_is_left_of_the_teacher_and_may_be_larger(name, value, saving):
    assert target_of(name, value, TEACHER, UNITS) == pytest.approx(saving)


@pytest.mark.parametrize(
    ("name", "value", "fragments"),
    [
        ("params", 0.4, ["budget.params=0.4 ", "0.500 (", "1.000 ("]),
        ("params", 2.0, ["budget.params=2 ", "0.500 ("]),
        ("memory_gb", 1.9, ["budget.memory_gb=1.9 ", "2 is left of the teacher's 4"]),
        ("latency_ratio", 0.6, ["budget.latency_ratio=0.6 ", "0.7 is left of the teacher's 1"]),
    ],
)
def test_a_budget_out_of_reach_says_what_is_reachable(name, value, fragments):
    with pytest.raises(UsageError, match="out of reach") as caught:
        target_of(name, value, TEACHER, UNITS)
    sentence = str(caught.value)
    assert [part for part in fragments if part not in sentence] == [], sentence


def point(params, error):
    return Point([], 0, params, 0.0, 0.0, 0.0, 0.0, error)


def test_costs_are_compared_at_like_sizes():
    points = {
        "velocity": [point(100, 0.0), point(80, 0.1), point(60, 0.2)],
        "loss": [point(100, 0.0), point(79, 0.2), point(58, 0.8)],
    }
    assert compare_costs(points) == pytest.approx((0.5 * 0.25) ** 0.5)


def test_equal_costs_compare_as_one():
    points = [point(100, 0.0), point(80, 0.1)]
    assert compare_costs({"velocity": points, "loss": points}) == 1
    assert compare_costs({"velocity": points[:1], "loss": points[:1]}) == 1
