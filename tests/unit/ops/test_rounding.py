from itertools import product

import pytest
import torch

from ppcl.ops.rounding import (
    Grid,
    InputMoments,
    best_weight,
    carry_errors,
    damped,
    descend,
    output_error,
    refit_grid,
    round_least_squares,
    spanning_grid,
)

SEEDS = range(5)


def layer(seed, dim_in=8, dim_out=6, samples=50):
    """A weight, and inputs whose features depend on one another, as those of a network do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(dim_out, dim_in, generator=generator, dtype=torch.float64)
    mixing = torch.randn(dim_in, dim_in, generator=generator, dtype=torch.float64)
    inputs = torch.randn(samples, dim_in, generator=generator, dtype=torch.float64) @ mixing
    return weight, inputs, generator


def errors(grid, ints, weight, inputs):
    """||(V - W) X||^2 per row, from the samples themselves."""
    return ((grid.values(ints) - weight) @ inputs.T).square().sum(1)


def grid_of(weight, group_size=4, bits=2, **settings):
    return spanning_grid(weight, group_size, bits, torch.float32, **settings)


def test_the_error_is_that_of_the_outputs():
    weight, inputs, _ = layer(0)
    grid = grid_of(weight)
    ints = grid.nearest(weight)
    found = output_error(grid.values(ints), weight, inputs.T @ inputs)
    torch.testing.assert_close(found, errors(grid, ints, weight, inputs))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_grid_spans_each_group_and_has_zero_on_it(bits, symmetric):
    weight = layer(0)[0]
    weight[0] = 0
    weight[1] = weight[1].abs() + 1
    grid = grid_of(weight, bits=bits, symmetric=symmetric)
    assert grid.scale.shape == (6, 2)
    ints = grid.nearest(weight)
    step = grid.scale.repeat_interleave(4, 1)
    assert ((grid.values(ints) - weight).abs() <= 0.501 * step).all()
    assert not grid.values(grid.nearest(torch.zeros_like(weight))).any()
    assert -(2 ** (bits - 1)) <= ints.min().item() <= ints.max().item() < 2 ** (bits - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_are_what_their_dtype_can_hold(dtype):
    weight, inputs, _ = layer(1)
    ints, grid = round_least_squares(weight, inputs.T @ inputs, spanning_grid(weight, 4, 4, dtype))
    for numbers in (grid.scale, grid.zero):
        assert torch.equal(numbers, numbers.to(dtype).double())
    assert ints.dtype == torch.int8


@pytest.mark.parametrize("seed", SEEDS)
def test_carried_errors_are_the_optimum_of_the_columns_that_are_open(seed):
    """By brute force: after each column the open ones are solved for anew, with no recursion and no Cholesky factor."""
    weight, inputs, _ = layer(seed)
    gram, grid = inputs.T @ inputs, grid_of(weight)
    found = carry_errors(weight, gram, grid)
    values = grid.values(found)
    order = gram.diagonal().argsort(descending=True).tolist()
    scale, zero = grid.spread()
    for place, column in enumerate(order):
        closed, still_open = order[:place], order[place:]
        lost = (values - weight)[:, closed] @ inputs[:, closed].T  # [dim_out, samples], what the closed ones got wrong
        wanted = weight[:, still_open] @ inputs[:, still_open].T - lost
        best = torch.linalg.lstsq(inputs[:, still_open], wanted.T).solution.T[:, 0]
        expected = (best / scale[:, column] + zero[:, column]).round().clamp(grid.low, grid.high)
        assert torch.equal(found[:, column].double(), expected)


def test_blocks_of_columns_change_nothing(monkeypatch):
    weight, inputs, _ = layer(3, dim_in=24, samples=100)
    gram, grid = inputs.T @ inputs, grid_of(weight)
    at_once = carry_errors(weight, gram, grid)
    for block in (1, 5, 24):
        monkeypatch.setattr("ppcl.ops.rounding._BLOCK", block)
        assert torch.equal(carry_errors(weight, gram, grid), at_once)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_step_lowers_the_error(seed):
    weight, inputs, _ = layer(seed, dim_in=16, samples=40)
    gram = inputs.T @ inputs
    for symmetric in (False, True):
        grid = grid_of(weight, symmetric=symmetric)
        ints = grid.nearest(weight)
        before = errors(grid, ints, weight, inputs)
        descended = descend(weight, gram, ints, grid)
        assert (errors(grid, descended, weight, inputs) <= before * (1 + 1e-9)).all()
        assert errors(grid, descended, weight, inputs).sum() < before.sum()
        refitted = refit_grid(weight, gram, ints, grid)
        assert (errors(refitted, ints, weight, inputs) <= before * (1 + 1e-9)).all()
        assert errors(refitted, ints, weight, inputs).sum() < before.sum()
        assert not symmetric or not refitted.zero.any()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_refitted_grid_is_the_least_squares_one(seed):
    """Against lstsq over the samples, a row at a time."""
    weight, inputs, _ = layer(seed)
    gram, grid = inputs.T @ inputs, grid_of(weight, bits=4)
    ints = carry_errors(weight, gram, grid)
    refitted = refit_grid(weight, gram, ints, grid)
    features = inputs.unflatten(1, (2, 4))  # [samples, groups, group_size]
    for row in range(len(weight)):
        by_scale = (features * ints[row].double().view(2, 4)).sum(-1)
        columns = torch.cat([by_scale, features.sum(-1)], dim=1)
        fitted = torch.linalg.lstsq(columns, inputs @ weight[row]).solution
        least = (columns @ fitted - inputs @ weight[row]).square().sum()
        torch.testing.assert_close(errors(refitted, ints, weight, inputs)[row], least, rtol=1e-3, atol=0)


def test_rows_in_several_batches_change_nothing(monkeypatch):
    weight, inputs, _ = layer(2)
    gram, grid = inputs.T @ inputs, grid_of(weight)
    at_once = refit_grid(weight, gram, grid.nearest(weight), grid)
    monkeypatch.setattr("ppcl.ops.rounding._LARGEST", 33)
    in_parts = refit_grid(weight, gram, grid.nearest(weight), grid)
    torch.testing.assert_close(in_parts.scale, at_once.scale)
    torch.testing.assert_close(in_parts.zero, at_once.zero)


def test_it_comes_near_the_best_of_all_integers():
    """Every one of the 4^5 ways to round a row is tried, for 80 rows."""
    totals = dict.fromkeys(("best", "ours", "with a grid of its own", "gptq", "nearest"), 0.0)
    for seed in range(20):
        weight, inputs, _ = layer(seed, dim_in=5, dim_out=4)
        gram, grid = inputs.T @ inputs, grid_of(weight, group_size=5)
        tried = torch.tensor(list(product(range(grid.low, grid.high + 1), repeat=5)), dtype=torch.int8)
        rows = [Grid(grid.scale[[row]], grid.zero[[row]], 5, 2, torch.float32) for row in range(4)]
        best = torch.stack([errors(row, tried, weight[i], inputs).min() for i, row in enumerate(rows)])
        ints, same = round_least_squares(weight, gram, grid, rounds=0)
        ours = errors(same, ints, weight, inputs)
        assert (ours >= best * (1 - 1e-9)).all()
        refined, its_grid = round_least_squares(weight, gram, grid)
        found = {"best": best, "ours": ours, "with a grid of its own": errors(its_grid, refined, weight, inputs)}
        found |= {"gptq": errors(grid, carry_errors(weight, gram, grid), weight, inputs)}
        found |= {"nearest": errors(grid, grid.nearest(weight), weight, inputs)}
        totals = {name: total + found[name].sum().item() for name, total in totals.items()}
    ratios = {name: total / totals["best"] for name, total in totals.items()}
    assert ratios["ours"] < 1.2 < ratios["gptq"] < ratios["nearest"], ratios
    assert ratios["with a grid of its own"] < 0.5, ratios


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("samples", [3, 12, 200])
def test_it_is_never_worse_than_the_nearest(seed, samples):
    weight, inputs, generator = layer(seed, dim_in=12, samples=samples)
    inputs[:, torch.randint(12, (2,), generator=generator)] = 0  # never seen
    gram, grid = damped(inputs.T @ inputs, 1e-6), grid_of(weight)
    ints, refined = round_least_squares(weight, gram, grid)
    found = output_error(refined.values(ints), weight, gram)
    assert (found <= output_error(grid.values(grid.nearest(weight)), weight, gram) * (1 + 1e-9)).all()


def test_a_weight_on_the_grid_stays():
    weight, inputs, _ = layer(0)
    grid = grid_of(weight, bits=4)
    ints = grid.nearest(weight)
    found, same = round_least_squares(grid.values(ints), inputs.T @ inputs, grid)
    assert torch.equal(found, ints)
    assert torch.equal(same.values(found), grid.values(ints))


def test_nothing_seen_rounds_to_the_nearest():
    weight = layer(0)[0]
    grid = grid_of(weight)
    ints, _ = round_least_squares(weight, damped(torch.zeros(8, 8, dtype=torch.float64), 0.01), grid, rounds=0)
    assert torch.equal(ints, grid.nearest(weight))


def test_smaller_groups_fit_better():
    weight, inputs, _ = layer(0, dim_in=16, samples=100)
    gram = inputs.T @ inputs
    totals = []
    for group_size in (16, 8, 4, 2):
        ints, grid = round_least_squares(weight, gram, grid_of(weight, group_size))
        assert grid.scale.shape == grid.zero.shape == (6, 16 // group_size)
        totals.append(errors(grid, ints, weight, inputs).sum().item())
    assert totals == sorted(totals, reverse=True)


def test_damping_is_relative_to_the_inputs():
    inputs = layer(0)[1]
    gram = inputs.T @ inputs
    strength = 0.1 * inputs.square().sum(0).mean()
    torch.testing.assert_close(damped(gram, 0.1), gram + strength * torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(damped(1e4 * gram, 0.1), 1e4 * damped(gram, 0.1))


def test_moments_add_up_over_batches():
    given, rounded = layer(0)[1], layer(1)[1]
    moments = InputMoments(8)
    for rows in torch.arange(50).split([20, 29, 1]):
        moments.add(rounded[rows].float(), given[rows].float())
    assert moments.count == 50
    torch.testing.assert_close(moments.gram, rounded.T @ rounded, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.cross, given.T @ rounded, rtol=1e-5, atol=1e-4)
    gram, cross = moments.centred()
    centred = [x - x.mean(0) for x in (rounded, given)]
    torch.testing.assert_close(gram, centred[0].T @ centred[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(cross, centred[1].T @ centred[0], rtol=1e-5, atol=1e-4)


def test_the_best_weight_answers_other_inputs_as_the_layer_did_its_own():
    weight, given, generator = layer(0)
    rounded = given + 0.3 * torch.randn(given.shape, generator=generator, dtype=torch.float64)
    gram, cross = rounded.T @ rounded, given.T @ rounded
    expected = torch.linalg.lstsq(rounded, given @ weight.T).solution.T
    torch.testing.assert_close(best_weight(weight, gram, cross, 0.0), expected)
    gram = given.T @ given
    torch.testing.assert_close(best_weight(weight, gram, gram, 0.01), weight)  # nothing to make up for
    nothing = torch.zeros(8, 8, dtype=torch.float64)
    torch.testing.assert_close(best_weight(weight, nothing, nothing, 0.01), weight)


@pytest.mark.parametrize("seed", SEEDS)
def test_rounding_towards_the_best_weight_beats_rounding_towards_the_weight(seed):
    """In what is asked of it: that rounded inputs give what the inputs gave."""
    weight, given, generator = layer(seed)
    rounded = given + 0.3 * torch.randn(given.shape, generator=generator, dtype=torch.float64)
    gram, cross = rounded.T @ rounded, given.T @ rounded
    found = []
    for target in (best_weight(weight, gram, cross, 1e-9), weight):
        ints, grid = round_least_squares(target, gram, grid_of(target, bits=4))
        found.append((grid.values(ints) @ rounded.T - weight @ given.T).square().sum().item())
    assert found[0] < found[1]
