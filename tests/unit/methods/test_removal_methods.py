"""Blocks are removed in the order that can be computed by hand, until the size is reached."""

import math
import random
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from ppcl.config import MethodConfig
from ppcl.data.batches import TrainingBatch
from ppcl.errors import UsageError
from ppcl.families.registry import get_family
from ppcl.layers import kept_layers
from ppcl.methods.base import Teacher
from ppcl.methods.bk_sdm import kept_by_scheme
from ppcl.methods.greedy import least_error
from ppcl.methods.registry import load_method
from ppcl.methods.removal import Room, added_up, proportional
from ppcl.methods.windows import mean_cosines
from ppcl.surgery.count import block_sizes
from ppcl.taps import observe

SIZED = (
    "amber",
    "bk_sdm",
    "cka_sensitivity",
    "flux_lite",
    "greedy",
    "hierarchical_prune",
    "llm_streamline",
    "random",
    "replace_me",
    "shortgpt",
    "uniform",
)


class Matrix(nn.Module):
    """x -> x A."""

    def __init__(self, rows):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(rows))

    def forward(self, *, hidden_states):
        return hidden_states @ self.weight


def turned(scale, degrees):
    """A block that scales its tokens of two features and turns them."""
    cosine, sine = (scale * function(math.radians(degrees)) for function in (math.cos, math.sin))
    return Matrix([[cosine, sine], [-sine, cosine]])


def stretched(first, second):
    """A block that scales each of two features by a factor of its own."""
    return Matrix([[first, 0.0], [0.0, second]])


@pytest.fixture
def teacher_of(make_linear_teacher):
    """`teacher_of(blocks, tokens)`: a teacher of these blocks, and one sample of tokens of two features."""

    def make(blocks, tokens=((1.0, 0.0), (0.0, 1.0))):
        family, transformer, _ = make_linear_teacher([0.1])
        transformer.blocks = nn.ModuleList(blocks)
        inputs = torch.tensor([tokens])
        batch = TrainingBatch({"hidden_states": inputs}, torch.zeros_like(inputs), torch.full((1,), 0.5))
        return Teacher(family, transformer, lambda: [batch], lambda: None)

    return make


@pytest.fixture
def turning(teacher_of):
    """Six blocks. The states before and after them have the norms 1, 2, 2, 6, 6, 3, 3 and the angles below.

    State:  0  1   2   3    4    5    6
    Angle:  0  0  90  90  120  130  250
    """
    turns = [(2.0, 0), (1.0, 90), (3.0, 0), (1.0, 30), (0.5, 10), (1.0, 120)]
    return teacher_of([turned(*turn) for turn in turns])


def removed_by(rule, teacher, num_remove, **settings):
    """The blocks of a single stack that a method removes, and its scores."""
    found = load_method(MethodConfig(rule=rule, num_remove=num_remove, settings=settings)).detect(teacher)
    (stack,) = found.intervals
    layers = len(teacher.transformer.get_submodule(stack))
    kept = kept_layers(layers, found.intervals[stack])
    return sorted({*range(layers)} - {*kept}), found.scores


def cosine(degrees):
    return math.cos(math.radians(degrees))


def test_block_influence_is_one_minus_the_cosine_of_input_and_output(turning):
    removed, scores = removed_by("shortgpt", turning, 1)
    expected = [0, 1, 0, 1 - cosine(30), 1 - cosine(10), 1 - cosine(120)]
    assert [*scores["block_influence"].values()] == pytest.approx(expected, abs=1e-6)
    assert removed == [2]  # block 0 has the same influence, and has to stay
    assert removed_by("shortgpt", turning, 2)[0] == [2, 4]
    assert removed_by("shortgpt", turning, 4)[0] == [1, 2, 3, 4]


def test_block_influence_never_removes_the_last_block(teacher_of):
    teacher = teacher_of([turned(1.0, degrees) for degrees in (0, 30, 20, 0)])
    assert removed_by("shortgpt", teacher, 1)[0] == [2]
    with pytest.raises(UsageError, match=r"^method\.num_remove=3 exceeds the 2 blocks that may be removed"):
        removed_by("shortgpt", teacher, 3)


def test_flux_lite_ranks_by_the_squared_error_per_feature(turning):
    removed, scores = removed_by("flux_lite", turning, 1)
    # For norms a and b and an angle t between them it is (a^2 + b^2 - 2 a b cos(t)) / 2.
    expected = [1 / 2, 8 / 2, 16 / 2, 72 * (1 - cosine(30)) / 2, (45 - 36 * cosine(10)) / 2, 18 * 1.5 / 2]
    assert [*scores["mse"].values()] == pytest.approx(expected, rel=1e-5)
    assert removed == [1]
    assert removed_by("flux_lite", turning, 2)[0] == [1, 4]
    assert removed_by("flux_lite", turning, 3)[0] == [1, 3, 4]


def test_cka_sensitivity_follows_the_formula_of_diagonal_blocks(teacher_of):
    """Of white tokens CKA(X A, X B) is sum(a^2 b^2) / sqrt(sum(a^4) sum(b^4)) for diagonal A and B."""
    blocks = [stretched(*scales) for scales in ((1.0, 1.0), (2.0, 1.0), (1.0, 3.0), (1.0, 1.5))]
    teacher = teacher_of(blocks, [(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)])
    whole = (4, 20.25)  # the squares of the products (2, 4.5)
    expected = []
    for without in (whole, (1, 20.25), (4, 2.25), (4, 9)):
        cross = sum(a * b for a, b in zip(whole, without, strict=True))
        expected.append(cross / math.sqrt(sum(a * a for a in whole) * sum(b * b for b in without)))
    removed, scores = removed_by("cka_sensitivity", teacher, 1)
    assert [*scores["cka_without"].values()] == pytest.approx(expected, rel=1e-6)
    assert removed == [1]
    assert removed_by("cka_sensitivity", teacher, 2)[0] == [1, 3]
    # Each token lies on one axis, so that all outputs are the same when tokens have norm 1.
    _, scores = removed_by("cka_sensitivity", teacher, 1, normalise=True)
    assert [*scores["cka_without"].values()] == pytest.approx([1, 1, 1, 1], abs=1e-6)


def test_hierarchical_prune_weighs_errors_so_that_late_blocks_go_first(teacher_of):
    """Without a block that scales by s the velocity is v / s, and its relative error is (1 - 1 / s)^2."""
    teacher = teacher_of([turned(scale, 0) for scale in (2.0, 2.0, 4.0, 3.0)])
    errors = [0.25, 0.25, 0.5625, 4 / 9]
    removed, scores = removed_by("hierarchical_prune", teacher, 1)
    weighted = [error * weight for error, weight in zip(errors, (1, 2 / 3, 1 / 3, 0), strict=True)]
    assert [*scores["weighted_velocity_error"].values()] == pytest.approx(weighted, abs=1e-6)
    assert removed == [3]
    assert removed_by("hierarchical_prune", teacher, 2)[0] == [1, 3]
    removed, scores = removed_by("hierarchical_prune", teacher, 1, position_power=0)
    assert [*scores["weighted_velocity_error"].values()] == pytest.approx(errors, abs=1e-6)
    assert removed == [1]


@pytest.fixture
def scaling(teacher_of):
    """Blocks that scale the velocity v, so that without some of them it is v / s, whose error is (1 - 1 / s)^2.

    Here s is the product of the scales of the removed blocks.
    """
    return teacher_of([turned(scale, 0) for scale in (1.0, 1.1, 1.05, 0.8, 1.25, 3.0)])


def error_without(*scales):
    return (1 - 1 / math.prod(scales)) ** 2


def test_greedy_measures_anew_after_each_removal(scaling):
    """Alone block 1 has less error than blocks 3 and 4, but these two undo each other."""
    removed, scores = removed_by("greedy", scaling, 4)
    assert removed == [1, 2, 3, 4]
    expected = {2: (1.05,), 1: (1.05, 1.1), 3: (1.05, 1.1, 0.8), 4: (1.05, 1.1, 0.8, 1.25)}
    found = scores["velocity_error"]
    assert [*found] == [f"blocks.{index}" for index in expected]  # in the order in which they went
    assert [*found.values()] == pytest.approx([error_without(*scales) for scales in expected.values()], rel=1e-4)
    # After block 2 block 3 leaves a product of 0.84, and block 1 one of 1.155, which is nearer to 1.
    assert removed_by("greedy", scaling, 3)[0] == [1, 2, 3]  # 0.924, whereas block 4 would leave 1.44
    assert removed_by("hierarchical_prune", scaling, 3, position_power=0)[0] == [1, 2, 4]


def test_greedy_removals_are_spread_as_far_as_asked(scaling):
    assert removed_by("greedy", scaling, 2)[0] == [1, 2]
    assert removed_by("greedy", scaling, 2, min_kept_between=1)[0] == [2, 4]
    assert removed_by("greedy", scaling, 2, min_kept_between=2)[0] == [2, 5]
    # Block 2 leaves the least error, but without it three blocks can be apart only if all others are odd.
    assert removed_by("greedy", scaling, 3, min_kept_between=1)[0] == [1, 3, 5]


def test_a_size_that_the_spread_makes_impossible_is_refused(scaling, real):
    said = r"^method\.num_remove=4 exceeds the 3 blocks that may be removed with method\.settings\.min_kept_between=1: "
    with pytest.raises(UsageError, match=said + "give at most that many"):
        removed_by("greedy", scaling, 4, min_kept_between=1)
    method = load_method(MethodConfig(rule="greedy", params=0.3, settings={"min_kept_between": 1}))
    with pytest.raises(UsageError, match=r"cannot be reached: without the 2 blocks .* so give at least"):
        method.detect(real)


def test_greedy_takes_batches_of_all_noise_levels(scaling):
    """Four batches of samples, each at four levels: batch n has level n % 4."""
    (batch,) = scaling.calibration()
    numbered = [replace(batch, sigmas=torch.tensor([float(n)])) for n in range(16)]
    teacher = replace(scaling, calibration=lambda: iter(numbered))
    for count, chosen in ((1, [0]), (2, [0, 2]), (4, [0, 1, 2, 3]), (16, [*range(16)])):
        config = MethodConfig(
            rule="greedy", num_remove=1, num_samples=16, num_timesteps=4, batch_size=4, settings={"batches": count}
        )
        assert [each.sigmas.item() for each in load_method(config)._batches(teacher)] == chosen
    with pytest.raises(UsageError, match=r"^method\.settings\.batches=17 exceeds the 16 calibration batches"):
        load_method(replace(config, settings={"batches": 17}))


def test_the_least_sum_is_found_without_measuring_everything():
    table = {("blocks", 1): [5, 0, 0], ("blocks", 2): [1, 1, 1], ("blocks", 3): [0, 4, 0], ("blocks", 4): [3, 0, 0]}
    chosen, errors, measured = least_error([*table], range(3), lambda key, step: float(table[key][step]))
    assert (chosen, errors) == (("blocks", 2), {0: 1, 1: 1, 2: 1})  # the first of two with the sum 3
    assert measured == 4 + 1 + 2  # all on the first step, block 3 on the second, block 2 on two more


@pytest.mark.parametrize("seed", range(20))
def test_the_least_sum_is_that_of_all_sums(seed):
    draw = random.Random(seed)
    table = {("blocks", index): [draw.random() for _ in range(5)] for index in range(8)}
    chosen, errors, measured = least_error([*table], range(5), lambda key, step: table[key][step])
    assert chosen == min(table, key=lambda key: math.fsum(table[key]))
    assert [*errors.values()] == table[chosen]
    assert 8 + 4 <= measured <= 8 * 5


def test_the_cost_of_removals_one_by_one_is_known_before(family):
    """Of four blocks three may go. Their single removals leave three blocks each, and two more leave two each."""
    layers = {"transformer_blocks": 4}
    method = load_method(MethodConfig(rule="greedy", num_remove=2, settings={"batches": 2}))  # of 8
    assert method.passes(family, layers) == pytest.approx((1 + 3 * 3 / 4 + 2 * 2 / 4) * 2 / 8)
    assert load_method(MethodConfig(rule="cka_sensitivity", num_remove=2)).passes(family, layers) == 4
    assert load_method(MethodConfig(rule="shortgpt", num_remove=2)).passes(family, layers) == 1


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("between", [0, 1, 2])
def test_the_most_that_can_go_beside_others_is_found(seed, between):
    """The same as trying all sets of blocks, which have different sizes."""
    draw = random.Random(seed)
    sizes = {("blocks", index): draw.randint(1, 9) for index in range(1, 8)}
    method = load_method(MethodConfig(rule="greedy", params=0.5, settings={"min_kept_between": between}))
    room = Room(method.config, [*sizes], sizes, 100)
    removed = [("blocks", draw.randint(1, 7))]

    def fits(blocks):
        return all(after[1] - before[1] > between for before, after in pairwise(sorted([*removed, *blocks])))

    sets = [chosen for count in range(8) for chosen in combinations(sizes, count) if fits(chosen)]
    found = method._most_beside(removed, room)
    assert fits(found)
    assert sum(map(sizes.get, found)) == max(sum(map(sizes.get, chosen)) for chosen in sets)


@pytest.mark.parametrize(
    ("rule", "num_remove", "window", "degrees"),
    [
        ("llm_streamline", 1, [3], 30),  # the input of block 2 and the output of block 3
        ("llm_streamline", 2, [3, 4], 40),
        ("replace_me", 1, [2], 0),  # the outputs of blocks 1 and 2
        ("replace_me", 2, [2, 3], 30),
    ],
)
def test_a_window_is_the_run_whose_ends_are_most_alike(turning, rule, num_remove, window, degrees):
    removed, scores = removed_by(rule, turning, num_remove)
    assert removed == window
    found = scores["window_cosine"]
    assert len(found) == 6 - num_remove
    assert max(found.values()) == found[f"blocks.{window[0] - 1}-{window[-1]}"]
    assert max(found.values()) == pytest.approx(cosine(degrees), abs=1e-6)


def test_clusters_merge_in_the_order_of_their_cosines(turning):
    removed, scores = removed_by("amber", turning, 3)
    assert removed == [2, 3, 4]
    between = (2 * cosine(30) + 2 * cosine(40)) / 4
    expected = {"blocks.1-2": 1, "blocks.3-4": cosine(10), "blocks.1-4": between}
    assert scores["cluster_cosine"] == pytest.approx(expected, abs=1e-6)
    assert [*scores["cluster_cosine"]] == [*expected]


def test_clusters_are_no_longer_than_asked(turning):
    assert removed_by("amber", turning, 3, max_length=3)[0] == [1, 2, 4]
    with pytest.raises(UsageError, match=r"^method\.num_remove=4 exceeds the 3 blocks that clusters of at most method"):
        removed_by("amber", turning, 4, max_length=2)
    with pytest.raises(UsageError, match=r"^method\.num_remove=3 exceeds the 2 blocks that clusters lost before no"):
        removed_by("amber", turning, 3, max_length=2)


def test_bk_sdm_keeps_what_the_paper_keeps():
    assert kept_by_scheme(28, 14) == [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]


@pytest.mark.parametrize("num_blocks", [2, 3, 9, 20, 28])
def test_bk_sdm_keeps_as_many_as_asked_and_the_first(num_blocks):
    for count in range(num_blocks):
        kept = kept_by_scheme(num_blocks, count)
        assert kept == sorted({*kept} & {*range(num_blocks)})
        assert (kept[0], len(kept)) == (0, num_blocks - count)


def test_patterns_need_no_data(turning):
    turning = replace(turning, calibration=lambda: 1 / 0)
    assert removed_by("bk_sdm", turning, 2)[0] == [2, 3]
    assert removed_by("uniform", turning, 2)[0] == [2, 4]
    assert removed_by("uniform", turning, 5)[0] == [1, 2, 3, 4, 5]
    assert removed_by("random", turning, 3, seed=0)[0] == [3, 4, 5]  # on every machine
    assert len({tuple(removed_by("random", turning, 2, seed=seed)[0]) for seed in range(10)}) > 3


def test_stacks_lose_blocks_in_proportion():
    assert proportional(6, {"double": 10, "single": 20}) == {"double": 2, "single": 4}
    assert proportional(3, {"one": 5, "other": 5}) == {"one": 2, "other": 1}
    assert proportional(25, {"one": 5, "other": 20}) == {"one": 5, "other": 20}


def test_sums_of_ranks_are_added_where_one_has_nothing():
    teacher = Teacher(None, None, None, None, gathered=lambda value: [{}, value, {"a": 2, "c": 5}])
    assert added_up(teacher, {"a": 1, "b": 3}) == {"a": 3, "b": 3, "c": 5}


# Real blocks, of two streams with padded text


@pytest.fixture
def real(family, make_transformer, make_batch):
    return Teacher(family, make_transformer(5), lambda: [make_batch(seed) for seed in (0, 1)], lambda: None)


def states(teacher):
    """For each stream the valid tokens of both batches before each block and after the last, `[6, T, D]`."""
    found = {"image": [], "text": []}
    for batch in teacher.calibration():
        mask = teacher.family.masks(batch.inputs)["text"]
        calls = []
        observe(teacher.family, teacher.transformer, batch.inputs, calls.append)
        for stream, valid in (("image", slice(None)), ("text", mask)):
            seen = [*(call.inputs[stream] for call in calls), calls[-1].outputs[stream]]
            found[stream].append(torch.stack([each[valid].flatten(0, -2) for each in seen]))
    return {stream: torch.cat(parts, dim=1) for stream, parts in found.items()}


@torch.no_grad()
@pytest.mark.parametrize("stream", ["image", "text", "mean"])
def test_a_stream_decides_by_its_valid_tokens(real, stream):
    chosen = ["image", "text"] if stream == "mean" else [stream]
    config = MethodConfig(rule="shortgpt", num_remove=1, stream=stream)
    scores = load_method(config).detect(real).scores["block_influence"]
    cosines = mean_cosines(load_method(replace(config, rule="amber")), real)["transformer_blocks"]
    tokens = states(real)
    for index in range(5):
        means = [cosine_similarity(tokens[s][index], tokens[s][index + 1], dim=-1).mean().item() for s in chosen]
        assert scores[f"transformer_blocks.{index}"] == pytest.approx(1 - sum(means) / len(means), abs=1e-5)
        assert cosines[index, index + 1].item() == pytest.approx(sum(means) / len(means), abs=1e-5)


@pytest.mark.parametrize("rule", SIZED)
@pytest.mark.parametrize("share", [0.9, 0.5])
def test_blocks_go_until_the_parameters_are_few_enough(real, rule, share):
    found = load_method(MethodConfig(rule=rule, params=share)).detect(real)
    sizes, total = block_sizes(real.family, real.transformer)
    kept = kept_layers(5, found.intervals["transformer_blocks"])
    left = total - sum(size for (_, index), size in sizes.items() if index not in kept)
    assert left <= share * total
    assert left + max(sizes.values()) > share * total
    number = load_method(MethodConfig(rule=rule, params=int(share * total))).detect(real)
    assert number.intervals == found.intervals


def test_parameters_that_cannot_be_reached_are_refused_with_the_share_that_can(real):
    sizes, total = block_sizes(real.family, real.transformer)
    least = total - 4 * max(sizes.values())
    with pytest.raises(UsageError, match=r"^method\.params=0\.01 cannot be reached: .* so give at least") as refused:
        load_method(MethodConfig(rule="flux_lite", params=0.01)).detect(real)
    share = float(str(refused.value).split()[-1].rstrip("."))
    assert least / total <= share < least / total + 0.001
    load_method(MethodConfig(rule="flux_lite", params=share)).detect(real)
    for params in (1, total):
        with pytest.raises(UsageError, match=r"removes nothing from a model of"):
            load_method(MethodConfig(rule="flux_lite", params=params)).detect(real)


def test_a_window_lies_in_one_stack():
    family = get_family("flux")
    method = load_method(MethodConfig(rule="llm_streamline", num_remove=7))
    with pytest.raises(UsageError, match=r"num_remove=7 exceeds the 5 blocks that one window in one stack may lose"):
        method.check_model(family, {"transformer_blocks": 4, "single_transformer_blocks": 6})
    load_method(MethodConfig(rule="uniform", num_remove=7)).check_model(
        family, {"transformer_blocks": 4, "single_transformer_blocks": 6}
    )


@pytest.mark.parametrize(
    ("settings", "removed"),
    [
        ({"keep": [0, 1, 4]}, [2, 3]),
        ({"remove": [4, 2]}, [2, 4]),
        ({"remove": {"transformer_blocks": [1]}}, [1]),
    ],
)
def test_indices_are_removed_as_they_are_named(real, settings, removed):
    assert removed_by("indices", real, None, **settings)[0] == removed


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"remove": [0]}, r"^method\.settings\.remove removes block 0 of transformer_blocks, which has to stay: leave"),
        ({"keep": [1, 2]}, r"^method\.settings\.keep removes block 0 of transformer_blocks, which has to stay: add it"),
        ({"remove": [5]}, r"^method\.settings\.remove: 5 is no block of transformer_blocks, whose blocks are 0 to 4"),
        ({"remove": [1.5]}, r"1\.5 is no block"),
        ({"remove": 3}, r"^method\.settings\.remove=3 is no list"),
        ({"remove": {"blocks": [1]}}, r"no block stack blocks \(it has transformer_blocks\)"),
        ({"remove": []}, r"removes no block"),
        ({"keep": [0, 1, 2, 3, 4]}, r"removes no block"),
        ({}, r"needs either method\.settings\.keep or method\.settings\.remove"),
        ({"keep": [0], "remove": [1]}, r"needs either method\.settings\.keep or method\.settings\.remove"),
    ],
)
def test_indices_that_cannot_be_removed_are_refused(family, settings, said):
    with pytest.raises(UsageError, match=said):
        load_method(MethodConfig(rule="indices", settings=settings)).check_model(family, {"transformer_blocks": 5})


def test_a_list_of_indices_is_refused_for_several_stacks():
    layers = {"transformer_blocks": 4, "single_transformer_blocks": 6}
    with pytest.raises(UsageError, match=r"write method\.settings\.remove=\{STACK:\[\.\.\.\]\}"):
        load_method(MethodConfig(rule="indices", settings={"remove": [1]})).check_model(get_family("flux"), layers)


@pytest.mark.parametrize("rule", SIZED)
def test_exactly_one_size_is_given(rule):
    with pytest.raises(UsageError, match=rf"^method\.rule={rule} needs a size"):
        load_method(MethodConfig(rule=rule))
    with pytest.raises(UsageError, match=r"^method\.num_remove=2 and method\.params=0\.7 are both set"):
        load_method(MethodConfig(rule=rule, num_remove=2, params=0.7))


@pytest.mark.parametrize("rule", ["lp", "lp_b", "indices"])
@pytest.mark.parametrize("size", [{"num_remove": 2}, {"params": 0.7}])
def test_a_size_is_refused_where_it_has_no_effect(rule, size):
    with pytest.raises(UsageError, match=rf"^method\.{next(iter(size))}=.* has no effect with method\.rule={rule}"):
        load_method(MethodConfig(rule=rule, settings={}, **size))


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("random", {"seed": -1}),
        ("greedy", {"batches": 0}),
        ("hierarchical_prune", {"position_power": -1.0}),
        ("amber", {"max_length": 1}),
    ],
)
def test_settings_have_bounds(rule, settings):
    with pytest.raises(UsageError, match=rf"^method\.settings\.{next(iter(settings))}=.* must be at least"):
        load_method(MethodConfig(rule=rule, num_remove=1, settings=settings))
