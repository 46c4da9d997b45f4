"""Which blocks make up a group, and how many of them stay."""

import pytest

from ppcl.errors import UsageError
from ppcl.layers import removable
from ppcl.methods.patterns import groups_of, spread

BLOCKS = "transformer_blocks"


def free(layers, **limits):
    return removable(layers, **limits)


def sizes(groups):
    return [(group.keep, len(group.blocks)) for group in groups]


@pytest.mark.parametrize(
    ("groups", "removed"),
    [("1:2", 14), ("2:4", 14), ("7:14", 14), ("1:4", 21), ([[2, 4], [3, 4], [10, 12], [8, 8]], 5)],
)
def test_patterns_of_28_blocks(groups, removed):
    found = groups_of(groups, {BLOCKS: 28}, free({BLOCKS: 28}))
    assert [index for group in found for index in group.blocks] == list(range(28))
    assert sum(group.num_removed for group in found) == removed
    assert not any(0 in choice for group in found for choice in group.choices())
    assert all(len(group.choices()) == group.num_choices for group in found)


def test_the_first_group_has_only_the_choices_that_keep_its_first_block():
    first, second = groups_of("2:4", {BLOCKS: 8}, free({BLOCKS: 8}))
    assert first.choices() == [(1, 2), (1, 3), (2, 3)]
    assert second.choices() == [(4, 5), (4, 6), (4, 7), (5, 6), (5, 7), (6, 7)]


def test_what_the_family_and_the_method_exclude_stays():
    first, second = groups_of("3:4", {BLOCKS: 8}, free({BLOCKS: 8}, start=1, end=6, last=1))
    assert first.free == (2, 3)
    assert second.free == (4, 5, 6)


@pytest.mark.parametrize(("count", "removed"), [(20, 10), (20, 1), (20, 14), (60, 25), (5, 2), (2, 1)])
def test_removals_are_spread_evenly(count, removed):
    groups = spread(removed, {BLOCKS: count}, free({BLOCKS: count}))
    assert sum(group.num_removed for group in groups) == removed
    assert all(group.keep >= 1 for group in groups)
    shares = [group.num_removed / min(len(group.free), len(group.blocks) - 1) for group in groups if group.free]
    assert max(shares) - min(shares) <= 1
    if count == 60:
        assert {group.num_removed for group in groups} == {1, 2}


def test_each_stack_has_groups_of_its_own():
    layers = {"double": 4, "single": 8}
    assert sizes(groups_of("1:2", layers, free(layers))) == [(1, 2)] * 6
    assert sizes(groups_of({"single": [[3, 4], [4, 4]]}, layers, free(layers))) == [(3, 4), (4, 4)]
    groups = spread(6, layers, free(layers))
    assert [group.stack for group in groups] == ["double", "single", "single"]
    assert [group.num_removed for group in groups] == [2, 2, 2]


@pytest.mark.parametrize(
    ("given", "layers", "said"),
    [
        ("2:4", {BLOCKS: 10}, r"groups=2:4 makes groups of 8 blocks together, and the model has 10"),
        ([[2, 4], [2, 4]], {BLOCKS: 10}, r"makes groups of 8 blocks together, and the model has 10"),
        ([[5, 4]], {BLOCKS: 4}, r"the group \[5, 4\] keeps 5 of 4 blocks; give \[N, M\] with N from 1 to M"),
        ([[0, 4]], {BLOCKS: 4}, r"the group \[0, 4\] keeps 0 of 4 blocks"),
        ("0:4", {BLOCKS: 4}, r"the group \[0, 4\]"),
        ("2:0", {BLOCKS: 4}, r"the group \[2, 0\]"),
        ([[4, 4]], {BLOCKS: 4}, r"keeps every block"),
        ("half", {BLOCKS: 4}, r"groups=half is no pattern of groups: write a list"),
        (124, {BLOCKS: 4}, r"groups=124 is no pattern of groups"),
        ([2, 4], {BLOCKS: 4}, r"is no pattern of groups"),
        ([[2, 4, 4]], {BLOCKS: 4}, r"is no pattern of groups"),
        ([[1.5, 4]], {BLOCKS: 4}, r"is no pattern of groups"),
        ([], {BLOCKS: 4}, r"is no pattern of groups"),
        ([[14, 28]], {BLOCKS: 28}, r"20,058,300 ways, and 100,000 can be learned: divide it into smaller groups"),
        ([[2, 4]], {"double": 4, "single": 8}, r"does not say which stack it is for: give a list for each of double"),
        ({"other": "1:2"}, {"double": 4}, r"groups\.other: the model has no block stack other \(it has double\)"),
    ],
)
def test_groups_that_do_not_fit_are_refused(given, layers, said):
    with pytest.raises(UsageError, match=said):
        groups_of(given, layers, free(layers))


def test_a_group_that_may_lose_too_few_blocks_is_refused():
    with pytest.raises(UsageError, match=r"transformer_blocks\.0-1 is to lose 1 blocks, and 0 of them may go"):
        groups_of("1:2", {BLOCKS: 4}, free({BLOCKS: 4}, start=1))


def test_each_group_keeps_a_block_however_many_are_to_go():
    assert [group.num_removed for group in spread(100, {BLOCKS: 8}, free({BLOCKS: 8}))] == [3, 3]
