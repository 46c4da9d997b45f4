import pytest

from ppcl.surgery.count import count_parameters
from ppcl.surgery.plugboard import Plugboard


def numel(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("pairs", [[], [(0, 1)], [(1, 3), (4, 5)], [(0, 5)]])
def test_counts_equal_instantiated_models(family, make_transformer, pairs):
    teacher = make_transformer(6)
    arch = dict(teacher.config)
    total = numel(teacher)
    removed = sum(v - u for u, v in pairs)
    counts = count_parameters(family, arch, {"transformer_blocks": pairs})
    Plugboard(family, teacher, {"transformer_blocks": pairs}).remove()
    assert counts == {
        "teacher": total,
        "student": numel(teacher),
        "teacher_layers": 6,
        "student_layers": len(teacher.transformer_blocks),
    }
    assert counts["student"] == numel(make_transformer(6 - removed))


def test_a_stack_without_intervals_is_left_whole(family, make_transformer):
    counts = count_parameters(family, dict(make_transformer(3).config), {})
    assert counts["teacher"] == counts["student"]
    assert counts["teacher_layers"] == counts["student_layers"] == 3
