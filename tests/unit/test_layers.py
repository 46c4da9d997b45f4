"""Which blocks a text-pruned one reads, and width sets that cannot be."""

import pytest

from ppcl.errors import UsageError
from ppcl.layers import BlockMap, check_counts, check_width_sets, references

KEPT = [0, 1, 3, 5, 6, 8]  # 2, 4 and 7 went with intervals


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([], {}),
        ([1], {1: 0}),
        ([3], {3: 1}),
        ([3, 5], {3: 1, 5: 1}),
        ([8, 3, 6], {3: 1, 6: 5, 8: 5}),
        ([1, 3, 5, 6, 8], {1: 0, 3: 0, 5: 0, 6: 0, 8: 0}),
    ],
)
def test_the_nearest_intact_block_is_read(text, expected):
    assert references(KEPT, text) == expected


def test_blocks_that_are_not_kept_are_not_read():
    assert references([0, 5], [5]) == {5: 0}
    assert references(KEPT, [2]) == {}


@pytest.mark.parametrize(("kept", "text"), [(KEPT, [0]), (KEPT, [1, 0]), ([4, 5], [4])])
def test_the_first_block_has_nothing_to_read(kept, text):
    with pytest.raises(UsageError, match=rf"block {kept[0]} cannot lose its text stream: no intact block lies before"):
        references(kept, text)


@pytest.mark.parametrize(("text", "ffn"), [([], []), ([1, 8], []), ([], [0, 8]), ([1, 3, 5, 6, 8], KEPT)])
def test_sets_that_fit_pass(text, ffn):
    check_width_sets("transformer_blocks", KEPT, text, ffn, "width")


@pytest.mark.parametrize(
    ("text", "ffn", "message"),
    [
        ([3, 1, 3], [], "width.transformer_blocks.text names block 3 twice."),
        ([], [8, 8], "width.transformer_blocks.ffn names block 8 twice."),
        ([1, 4], [], "width.transformer_blocks.text: block 4 is not among the blocks that the intervals keep "
                     "(0-1, 3, 5-6, 8)."),
        ([1], [9], "width.transformer_blocks.ffn: block 9 is not among the blocks that the intervals keep "
                   "(0-1, 3, 5-6, 8)."),
        ([], [-1], "width.transformer_blocks.ffn: block -1 is not among the blocks that the intervals keep "
                   "(0-1, 3, 5-6, 8)."),
        ([0], [0], "width.transformer_blocks.text: block 0 cannot lose its text stream: no intact block lies before "
                   "it to read from."),
    ],
)  # fmt: skip
def test_sets_that_do_not_fit_are_told_by_stack_kind_and_block(text, ffn, message):
    with pytest.raises(UsageError) as refusal:
        check_width_sets("transformer_blocks", KEPT, text, ffn, "width")
    assert str(refusal.value) == message


def test_the_message_starts_with_where_the_sets_were_given():
    with pytest.raises(UsageError, match=r"^projectors\.single_blocks\.ffn: block 2 "):
        check_width_sets("single_blocks", [0, 1], [], [2], "projectors")


def test_stacks_that_one_config_key_counts_keep_as_many_blocks():
    keys = {"noise_refiner": "n_refiner_layers", "context_refiner": "n_refiner_layers", "layers": "n_layers"}
    check_counts(keys, {"noise_refiner": 1, "context_refiner": 1, "layers": 5})
    with pytest.raises(UsageError, match="noise_refiner is left with 1 blocks and context_refiner with 2, and"):
        check_counts(keys, {"noise_refiner": 1, "context_refiner": 2, "layers": 5})


def test_a_map_of_blocks_is_composed_and_taken_apart():
    once = BlockMap.of({"kept_layers": {"blocks": [0, 1, 3, 5]}, "removed_intervals": {"blocks": [[1, 2], [3, 4]]}},
                       {"blocks": 4})  # fmt: skip
    assert once.counts == {"blocks": 6}
    twice = once.then({"blocks": [0, 1, 3]})
    assert twice == BlockMap({"blocks": [0, 1, 5]}, {"blocks": 6})
    assert twice.removed == {"blocks": [[1, 4]]}
    assert twice.since(once.kept) == BlockMap({"blocks": [0, 1, 3]}, {"blocks": 4})
    assert twice.since(twice.kept).renumbered == []


def test_the_last_blocks_may_be_gone_and_a_model_without_a_map_is_its_own():
    cut = BlockMap.of({"kept_layers": {"blocks": [0, 1]}, "removed_intervals": {"blocks": [[1, 3]]}}, {"blocks": 2})
    assert cut.counts == {"blocks": 4}
    assert cut.removed == {"blocks": [[1, 3]]}
    assert cut.renumbered == ["blocks"]  # numbers are the same, and the last blocks are not there
    assert BlockMap.of(None, {"blocks": 3}) == BlockMap({"blocks": [0, 1, 2]}, {"blocks": 3})
    with pytest.raises(UsageError, match="kept_layers names 2 blocks"):
        BlockMap.of({"kept_layers": {"blocks": [0, 1]}}, {"blocks": 3})
