"""Rounding a linear layer to few bits so that its output changes least, rather than its weight.

For a layer y = W x + b, the inputs x `[dim_in, samples]` of the model as it was, and the inputs x_q of the model whose
earlier layers are rounded already, minimised is ||W_q x_q + b_q - W x - b||^2. With x_q = x it is the objective of GPTQ
(arXiv 2210.17323, Eq. 1), else that of asymmetric calibration (arXiv 2504.02692): a layer shall give what the model
gave, and so make up for the layers before it. With W* the best unrounded weight and G the Gram matrix of x_q it is
tr((W_q - W*) G (W_q - W*)^T) and a constant: every row is a problem of its own.

Everything is in float64, but scales and zero points are what the dtype they are stored in can hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int8
from torch import Tensor

_BLOCK = 128  # columns whose errors go to the columns behind them in one product
_SWEEPS = 4
_LARGEST = 1 << 26  # numbers in a batch of small systems


@dataclass
class Grid:
    """The values that a weight is rounded to: (q - zero) * scale for the integers low <= q <= high.

    `scale` and `zero` are `[dim_out, groups]`, one for `group_size` neighbouring columns of a row; `dtype` is what
    they will be stored in. A symmetric grid has zero = 0, for good.
    """

    scale: Float[Tensor, "dim_out groups"]
    zero: Float[Tensor, "dim_out groups"]
    group_size: int
    bits: int
    dtype: torch.dtype
    symmetric: bool = False

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def nearest(self, weight: Float[Tensor, "dim_out dim_in"]) -> Int8[Tensor, "dim_out dim_in"]:
        """The integers whose values are nearest to `weight`."""
        return _nearest(weight, *self.spread(), self).to(torch.int8)

    def values(self, ints: Int8[Tensor, "dim_out dim_in"]) -> Float[Tensor, "dim_out dim_in"]:
        scale, zero = self.spread()
        return (ints - zero) * scale

    def spread(self) -> tuple[Tensor, Tensor]:
        """Scale and zero of every column, `[dim_out, dim_in]` each."""
        return self.scale.repeat_interleave(self.group_size, 1), self.zero.repeat_interleave(self.group_size, 1)

    def with_values(self, scale: Tensor, zero: Tensor) -> Grid:
        return replace(self, scale=_stored(scale, self.dtype), zero=_stored(zero, self.dtype))


def _stored(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    return numbers.to(dtype).double()


def _nearest(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    return (weight / scale + zero).round().clamp(grid.low, grid.high)


def spanning_grid(
    weight: Float[Tensor, "dim_out dim_in"], group_size: int, bits: int, dtype: torch.dtype, *, symmetric: bool = False
) -> Grid:
    """The grid from the least to the greatest value of each group, with 0 on it."""
    groups = weight.double().unflatten(1, (-1, group_size))  # [dim_out, groups, group_size]
    least, greatest = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        greatest = torch.maximum(greatest, -least)
        least = -greatest
    tiny = torch.finfo(dtype).tiny  # of a group of zeros
    scale = _stored(((greatest - least) / (2**bits - 1)).clamp(min=tiny), dtype)
    grid = Grid(scale, torch.zeros_like(scale), group_size, bits, dtype, symmetric)
    if not symmetric:
        grid.zero = (grid.low - least / scale).round().clamp(grid.low, grid.high)
    return grid


class InputMoments:
    """Sums over all samples of x_q x_q^T, x x_q^T, x_q and x, which is all that is asked of a layer's inputs."""

    def __init__(self, dim_in: int, device: torch.device | None = None) -> None:
        self.gram, self.cross = torch.zeros(2, dim_in, dim_in, dtype=torch.float64, device=device)
        self.sum_rounded, self.sum_given = torch.zeros(2, dim_in, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, rounded: Float[Tensor, "samples dim_in"], given: Float[Tensor, "samples dim_in"]) -> None:
        rounded, given = rounded.double(), given.double()
        self.gram += rounded.T @ rounded
        self.cross += given.T @ rounded
        self.sum_rounded += rounded.sum(0)
        self.sum_given += given.sum(0)
        self.count += len(rounded)

    def centred(self) -> tuple[Tensor, Tensor]:
        """Gram and cross matrix of the inputs' distances to their means: what a bias of its own leaves to W_q."""
        mean = self.sum_rounded / max(1, self.count)
        return self.gram - self.sum_rounded.outer(mean), self.cross - self.sum_given.outer(mean)


def damped(gram: Float[Tensor, "dim_in dim_in"], damping: float) -> Float[Tensor, "dim_in dim_in"]:
    """`gram` with `damping` times its mean diagonal on its diagonal; the identity where no input was ever seen."""
    mean = gram.diagonal().mean()
    return gram + (damping * mean if mean > 0 else 1.0) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def best_weight(
    weight: Float[Tensor, "dim_out dim_in"],
    gram: Float[Tensor, "dim_in dim_in"],
    cross: Float[Tensor, "dim_in dim_in"],
    damping: float,
) -> Float[Tensor, "dim_out dim_in"]:
    """W* = (W x x_q^T + l W) (x_q x_q^T + l I)^-1, which answers x_q most nearly as W does x.

    l is `damping` times the mean diagonal of the Gram matrix; where x_q = x, W* = W.
    """
    with_damping = damped(gram, damping)
    wanted = weight.double() @ (cross + (with_damping - gram))
    return torch.linalg.solve(with_damping, wanted, left=False)


def output_error(
    values: Float[Tensor, "dim_out dim_in"],
    target: Float[Tensor, "dim_out dim_in"],
    gram: Float[Tensor, "dim_in dim_in"],
) -> Float[Tensor, " dim_out"]:
    """The diagonal of (V - W*) G (V - W*)^T: the squared error of each output, summed over the samples."""
    distance = values - target
    return ((distance @ gram) * distance).sum(1)


def carry_errors(
    target: Float[Tensor, "dim_out dim_in"], gram: Float[Tensor, "dim_in dim_in"], grid: Grid
) -> Int8[Tensor, "dim_out dim_in"]:
    """GPTQ (arXiv 2210.17323, Algorithm 1): column by column, each rounding error goes to the columns still open.

    After column j the others move by -(w_j - q_j) / U_jj * U_j, their optimum given q_j (Eq. 2), U being the upper
    Cholesky factor of G^-1. Columns with the largest inputs go first, while most others can make up for them.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    scale, zero = (numbers[:, order] for numbers in grid.spread())
    weight = target[:, order].clone()
    ints = torch.empty_like(weight)
    for start in range(0, len(gram), _BLOCK):
        stop = min(start + _BLOCK, len(gram))
        errors = torch.empty_like(weight[:, start:stop])
        for column in range(start, stop):
            one = slice(column, column + 1)
            ints[:, one] = _nearest(weight[:, one], scale[:, one], zero[:, one], grid)
            error = weight[:, one] - (ints[:, one] - zero[:, one]) * scale[:, one]
            errors[:, column - start] = error[:, 0] / factor[column, column]
            weight[:, column + 1 : stop] -= errors[:, column - start].outer(factor[column, column + 1 : stop])
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return ints[:, order.argsort()].to(torch.int8)


def descend(
    target: Float[Tensor, "dim_out dim_in"],
    gram: Float[Tensor, "dim_in dim_in"],
    ints: Int8[Tensor, "dim_out dim_in"],
    grid: Grid,
) -> Int8[Tensor, "dim_out dim_in"]:
    """Every column in turn to its best integers given all others, which is never worse (arXiv 2309.01885)."""
    scale, _ = grid.spread()
    found = ints.double()
    slope = (grid.values(ints) - target) @ gram  # [dim_out, dim_in]
    for _ in range(_SWEEPS):
        before = found.clone()
        for column in range(len(gram)):
            wanted = found[:, column] - slope[:, column] / (gram[column, column] * scale[:, column])
            new = wanted.round().clamp(grid.low, grid.high)
            slope += ((new - found[:, column]) * scale[:, column]).outer(gram[column])
            found[:, column] = new
        if torch.equal(found, before):
            break
    return found.to(torch.int8)


def refit_grid(
    target: Float[Tensor, "dim_out dim_in"],
    gram: Float[Tensor, "dim_in dim_in"],
    ints: Int8[Tensor, "dim_out dim_in"],
    grid: Grid,
) -> Grid:
    """Scale and zero of all groups of a row by least squares given its integers, or what it had if that is better.

    A row's values are linear in the scales s and offsets -s * zero of its groups: one small system a row.
    """
    values = grid.values(ints)
    size = max(1, _LARGEST // (2 * grid.scale.shape[1]) ** 2)
    parts = [
        _refit_rows((target[rows] - values[rows]) @ gram, gram, ints[rows].double(), grid, rows)
        for rows in torch.arange(len(target), device=target.device).split(size)
    ]
    scale, zero = (torch.cat(numbers) for numbers in zip(*parts, strict=True))
    new = grid.with_values(scale, zero)
    better = output_error(new.values(ints), target, gram) < output_error(values, target, gram)
    better = (better & (new.scale > 0).all(1))[:, None]
    return grid.with_values(torch.where(better, new.scale, grid.scale), torch.where(better, new.zero, grid.zero))


def _refit_rows(slope: Tensor, gram: Tensor, ints: Tensor, grid: Grid, rows: Tensor) -> tuple[Tensor, Tensor]:
    """New scale and zero `[rows, groups]` from `slope`, (W* - V) G for the present values V."""
    scale, zero = grid.scale[rows], grid.zero[rows]
    groups = scale.shape[1]
    size = groups if grid.symmetric else 2 * groups

    def by_group(numbers: Tensor) -> Tensor:
        return numbers.unflatten(-1, (groups, grid.group_size)).sum(-1)

    system = gram.new_empty(len(rows), size, size)
    for group, columns in enumerate(torch.arange(len(gram), device=gram.device).split(grid.group_size)):
        moved = ints[:, columns] @ gram[columns]  # [rows, dim_in], by one unit of this group's scale
        system[:, :groups, group] = by_group(ints * moved)
        if not grid.symmetric:
            system[:, groups:, group] = system[:, group, groups:] = by_group(moved)
            system[:, groups:, groups + group] = by_group(gram[columns].sum(0))
    wanted = by_group(ints * slope)
    if not grid.symmetric:
        wanted = torch.cat([wanted, by_group(slope)], dim=1)
    # Where a group's integers are all alike, scale and offset do the same: then the least change.
    ridge = 1e-9 * system.diagonal(dim1=1, dim2=2).mean(1)
    system.diagonal(dim1=1, dim2=2).add_(ridge.clamp(min=torch.finfo(gram.dtype).tiny)[:, None])
    change = torch.linalg.solve(system, wanted)
    if grid.symmetric:
        return scale + change, zero
    offset = change[:, groups:] - scale * zero
    scale = scale + change[:, :groups]
    return scale, -offset / scale


def round_least_squares(
    target: Float[Tensor, "dim_out dim_in"], gram: Float[Tensor, "dim_in dim_in"], grid: Grid, *, rounds: int = 2
) -> tuple[Int8[Tensor, "dim_out dim_in"], Grid]:
    """Integers and grid whose values give most nearly the outputs of `target`; never worse than the nearest ones.

    From GPTQ's integers, or the nearest in rows where those are better, down to a minimum; then `rounds` times a grid
    that fits the integers and integers that fit the grid, neither of which can raise the error.
    """
    ints, nearest = carry_errors(target, gram, grid), grid.nearest(target)
    errors = [output_error(grid.values(found), target, gram) for found in (ints, nearest)]
    ints = descend(target, gram, torch.where((errors[0] < errors[1])[:, None], ints, nearest), grid)
    for _ in range(rounds):
        grid = refit_grid(target, gram, ints, grid)
        ints = descend(target, gram, ints, grid)
    return ints, grid
