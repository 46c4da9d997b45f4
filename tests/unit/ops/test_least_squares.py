import pytest
import torch

from ppcl.efficiency import LiveBytes
from ppcl.ops import least_squares
from ppcl.ops.least_squares import NormalEquations
from ppcl.ops.rounding import InputMoments


def data(samples=200, dim_in=9, dim_out=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, dim_in, generator=generator) + 2
    y = x @ torch.randn(dim_in, dim_out, generator=generator) + torch.randn(samples, dim_out, generator=generator) - 1
    return x, y


def solve(batches, **settings):
    system = NormalEquations(batches[0][0].shape[1], batches[0][1].shape[1])
    for x, y in batches:
        system.add(x, y)
    return system.solve(**settings)


def with_ones(x):
    return torch.cat([x, torch.ones(len(x), 1)], dim=1).double()


def test_without_ridge_it_is_lstsq_with_a_column_of_ones():
    x, y = data()
    weight, bias = solve([(x, y)], ridge=0.0)
    expected = torch.linalg.lstsq(with_ones(x), y.double()).solution
    torch.testing.assert_close(weight, expected[:-1].T, rtol=0, atol=1e-9)
    torch.testing.assert_close(bias, expected[-1], rtol=0, atol=1e-9)


def test_without_bias_it_is_lstsq_through_the_origin():
    x, y = data()
    weight, bias = solve([(x, y)], ridge=0.0, bias=False)
    expected = torch.linalg.lstsq(x.double(), y.double()).solution
    torch.testing.assert_close(weight, expected.T, rtol=0, atol=1e-9)
    assert bias.tolist() == [0.0] * 5


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_batches_add_up_to_all_at_once(ridge):
    x, y = data()
    at_once = solve([(x, y)], ridge=ridge)
    streamed = solve([(x[:50], y[:50]), (x[50:51], y[50:51]), (x[51:], y[51:])], ridge=ridge)
    for ours, expected in zip(streamed, at_once, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 3.0])
def test_ridge_is_relative_and_spares_the_bias(ridge):
    """Equals the stacked least-squares problem whose extra rows pull every weight, and no bias, to zero."""
    x, y = data()
    weight, bias = solve([(x, y)], ridge=ridge)
    strength = ridge * x.double().square().sum(dim=0).mean()
    pull = torch.eye(9, 10, dtype=torch.float64) * strength.sqrt()
    rows = torch.cat([with_ones(x), pull])
    targets = torch.cat([y.double(), torch.zeros(9, 5, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, targets).solution
    torch.testing.assert_close(weight, expected[:-1].T, rtol=0, atol=1e-8)
    torch.testing.assert_close(bias, expected[-1], rtol=0, atol=1e-8)


def test_ridge_is_the_same_for_rescaled_inputs():
    x, y = data()
    weight, _ = solve([(x, y)], ridge=0.1)
    scaled, _ = solve([(100 * x, y)], ridge=0.1)
    torch.testing.assert_close(100 * scaled, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("samples", "dim_in", "repeated"), [(200, 9, True), (20, 32, False)])
def test_rank_deficient_inputs_give_the_smallest_solution(samples, dim_in, repeated, seed):
    """A repeated column, or fewer samples than features: infinitely many solutions fit equally well."""
    x, y = data(samples, dim_in, seed=seed)
    if repeated:
        x[:, 1] = x[:, 0]
    weight, bias = solve([(x, y)], ridge=0.0)
    expected = torch.linalg.lstsq(with_ones(x), y.double(), driver="gelsd").solution
    torch.testing.assert_close(torch.cat([weight.T, bias[None]]), expected, rtol=0, atol=1e-6)


def test_half_precision_inputs_are_summed_in_float64():
    """4096 ones in bfloat16 stall at 256 when summed in their own precision."""
    x = torch.ones(4096, 1, dtype=torch.bfloat16)
    system = NormalEquations(1, 1)
    system.add(x, 2 * x)
    assert system.gram.dtype == torch.float64
    assert system.gram[0, 0].item() == 4096
    assert system.cross[1, 0].item() == 8192


def test_chunks_of_rows_add_up_to_all_at_once(monkeypatch):
    x, y = data()
    expected = torch.linalg.lstsq(with_ones(x), y.double()).solution
    monkeypatch.setattr(least_squares, "COPIES", 8 * (9 + 5) * 30)  # 30 rows, so that the last chunk is smaller
    weight, bias = solve([(x, y)], ridge=0.0)
    torch.testing.assert_close(torch.cat([weight.T, bias[None]]), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("system", [NormalEquations(9, 9), InputMoments(9)])
def test_temporary_memory_does_not_grow_with_the_samples(system, monkeypatch):
    monkeypatch.setattr(least_squares, "COPIES", 8 * (9 + 9) * 100)
    peaks = []
    for samples in (400, 1600):
        x, y = data(samples, dim_out=9)
        with LiveBytes() as recorder:
            system.add(x, y)
        peaks.append(recorder.peak)
    assert peaks[0] == peaks[1] > 0


def test_inputs_that_are_all_zero_give_the_minimum_norm_solution():
    """There is nothing to damp, and the system is singular whatever the ridge."""
    system = NormalEquations(3, 2)
    system.add(torch.zeros(5, 3), torch.ones(5, 2))
    weight, bias = system.solve(ridge=1e-6)
    assert weight.abs().max() == 0
    assert bias.tolist() == pytest.approx([1, 1])
