"""Rounding of a linear layer to few bits so that its output, rather than its weight, changes least.

For a layer y = W x + b, let x `[dim_in, samples]` be its inputs in the original model, and x_q its inputs in the model
whose earlier layers are rounded already. The rounded weight W_q minimises ||W_q x_q + b_q - W x - b||^2. With x_q = x
this is the objective of GPTQ (arXiv 2210.17323, Eq. 1). Otherwise it is that of asymmetric calibration (arXiv
2504.02692), where a layer also corrects the errors of the layers before it.

Let W* be the best unrounded weight and G the Gram matrix of x_q. Up to a constant the objective is then
tr((W_q - W*) G (W_q - W*)^T), which is an independent problem for every row.

Everything is computed in float64. Scales and zero points are restricted to values of the dtype they are stored in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from ppcl.ops.least_squares import in_chunks

_BLOCK = 128  # columns whose errors are added to the later columns in one matrix product
_SWEEPS = 4  # the most passes of coordinate descent over all columns
_LARGEST = 1 << 26  # the most numbers in one batch of small linear systems


@dataclass
class Grid:
    """The values that weights are rounded to: (q - zero) * scale for the integers low <= q <= high.

    `scale`, `zero`: one per group of `group_size` neighbouring columns of a row.
    `bits`: the width of the integers. `dtype`: the dtype that scales and zeros will be stored in.
    `symmetric`: zero is 0 and stays 0.
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
        """Return the integers whose values are nearest to `weight`."""
        return _nearest(weight, *self.spread(), self).to(torch.int8)

    def values(self, ints: Int8[Tensor, "dim_out dim_in"]) -> Float[Tensor, "dim_out dim_in"]:
        """Return the weights that `ints` stand for."""
        scale, zero = self.spread()
        return (ints - zero) * scale

    def spread(self) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero of every single weight, `[dim_out, dim_in]` each."""
        return self.scale.repeat_interleave(self.group_size, 1), self.zero.repeat_interleave(self.group_size, 1)

    def with_values(self, scale: Tensor, zero: Tensor) -> Grid:
        """Return this grid with another scale and zero, rounded to the dtype they are stored in."""
        return replace(self, scale=_stored(scale, self.dtype), zero=_stored(zero, self.dtype))


def _stored(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    return numbers.to(dtype).double()


def _nearest(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    return (weight / scale + zero).round().clamp(grid.low, grid.high)


def spanning_grid(
    weight: Float[Tensor, "dim_out dim_in"], group_size: int, bits: int, dtype: torch.dtype, *, symmetric: bool = False
) -> Grid:
    """Return the grid that spans each group's values from the least to the greatest, and contains 0.

    `group_size`: the number of neighbouring columns that share a scale; it divides `dim_in`.
    """
    groups = weight.double().unflatten(1, (-1, group_size))  # [dim_out, groups, group_size]
    least, greatest = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        greatest = torch.maximum(greatest, -least)
        least = -greatest
    tiny = torch.finfo(dtype).tiny  # the scale of a group of zeros must not be 0
    scale = _stored(((greatest - least) / (2**bits - 1)).clamp(min=tiny), dtype)
    grid = Grid(scale, torch.zeros_like(scale), group_size, bits, dtype, symmetric)
    if not symmetric:
        grid.zero = (grid.low - least / scale).round().clamp(grid.low, grid.high)
    return grid


class InputMoments:
    """Accumulates over samples x_q x_q^T, x x_q^T, x_q and x, all that rounding needs to know of a layer's inputs."""

    def __init__(self, dim_in: int, device: torch.device | None = None) -> None:
        self.gram, self.cross = torch.zeros(2, dim_in, dim_in, dtype=torch.float64, device=device)
        self.sum_rounded, self.sum_given = torch.zeros(2, dim_in, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, rounded: Float[Tensor, "samples dim_in"], given: Float[Tensor, "samples dim_in"]) -> None:
        """Add samples: `rounded` is x_q and `given` is x. Temporary memory does not grow with their number."""
        for rows in in_chunks(rounded, given):
            x_rounded, x = (each.double() for each in rows)
            self.gram += x_rounded.T @ x_rounded
            self.cross += x.T @ x_rounded
            self.sum_rounded += x_rounded.sum(0)
            self.sum_given += x.sum(0)
            self.count += len(x)

    def centred(self) -> tuple[Tensor, Tensor]:
        """Return the Gram and cross matrix of the centred inputs, for a layer with a bias, which absorbs the means."""
        mean = self.sum_rounded / max(1, self.count)
        return self.gram - self.sum_rounded.outer(mean), self.cross - self.sum_given.outer(mean)


def damped(gram: Float[Tensor, "dim_in dim_in"], damping: float) -> Float[Tensor, "dim_in dim_in"]:
    """Return `gram` plus `damping` times its mean diagonal on the diagonal; the identity if `gram` is zero."""
    mean = gram.diagonal().mean()
    return gram + (damping * mean if mean > 0 else 1.0) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def best_weight(
    weight: Float[Tensor, "dim_out dim_in"],
    gram: Float[Tensor, "dim_in dim_in"],
    cross: Float[Tensor, "dim_in dim_in"],
    damping: float,
) -> Float[Tensor, "dim_out dim_in"]:
    """Return W* = (W x x_q^T + l W) (x_q x_q^T + l I)^-1, the weight whose output for x_q is nearest to W x.

    l is `damping` times the mean diagonal of the Gram matrix. If x_q = x, W* = W.
    """
    with_damping = damped(gram, damping)
    wanted = weight.double() @ (cross + (with_damping - gram))
    return torch.linalg.solve(with_damping, wanted, left=False)


def output_error(
    values: Float[Tensor, "dim_out dim_in"],
    target: Float[Tensor, "dim_out dim_in"],
    gram: Float[Tensor, "dim_in dim_in"],
) -> Float[Tensor, " dim_out"]:
    """Return the squared error of each output, summed over samples: the diagonal of (V - W*) G (V - W*)^T.

    `values`: V, the rounded weights. `target`: W*.
    """
    distance = values - target
    return ((distance @ gram) * distance).sum(1)


def carry_errors(
    target: Float[Tensor, "dim_out dim_in"], gram: Float[Tensor, "dim_in dim_in"], grid: Grid
) -> Int8[Tensor, "dim_out dim_in"]:
    """Round `target` by GPTQ (arXiv 2210.17323, Algorithm 1): columns not rounded yet compensate each rounding error.

    After column j is rounded to q_j, the later columns change by -(w_j - q_j) / U_jj * U_j, which is optimal given q_j
    (Eq. 2). U is the upper Cholesky factor of G^-1. The columns with the largest inputs are rounded first, while many
    others are left to compensate their errors.
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
    """Improve `ints` by coordinate descent: set one column after another to its best integers given all others.

    No step raises the output error (arXiv 2309.01885).
    """
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
    """Return the grid with the least-squares scale and zero for the integers `ints`.

    A row's values are linear in the scales s and offsets -s * zero of its groups, so each row is one small linear
    system. A row keeps its scale and zero if the new ones are no better.
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
    """Return a new scale and zero `[rows, groups]`, from `slope` = (W* - V) G for the present values V."""
    scale, zero = grid.scale[rows], grid.zero[rows]
    groups = scale.shape[1]
    size = groups if grid.symmetric else 2 * groups

    def by_group(numbers: Tensor) -> Tensor:
        return numbers.unflatten(-1, (groups, grid.group_size)).sum(-1)

    system = gram.new_empty(len(rows), size, size)
    for group, columns in enumerate(torch.arange(len(gram), device=gram.device).split(grid.group_size)):
        moved = ints[:, columns] @ gram[columns]  # [rows, dim_in], the change of V G per unit of this group's scale
        system[:, :groups, group] = by_group(ints * moved)
        if not grid.symmetric:
            system[:, groups:, group] = system[:, group, groups:] = by_group(moved)
            system[:, groups:, groups + group] = by_group(gram[columns].sum(0))
    wanted = by_group(ints * slope)
    if not grid.symmetric:
        wanted = torch.cat([wanted, by_group(slope)], dim=1)
    # If all integers of a group are equal, scale and offset are not determined: the ridge picks the smallest change.
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
    """Return integers and a grid whose values give nearly the outputs of `target`.

    Starts from GPTQ's integers, or in rows where they are better from the nearest ones, and improves them by coordinate
    descent. Then `rounds` times the grid is fitted to the integers and the integers to the grid. No step raises the
    error, so the result is never worse than rounding to the nearest values of `grid`.
    """
    ints, nearest = carry_errors(target, gram, grid), grid.nearest(target)
    errors = [output_error(grid.values(found), target, gram) for found in (ints, nearest)]
    ints = descend(target, gram, torch.where((errors[0] < errors[1])[:, None], ints, nearest), grid)
    for _ in range(rounds):
        grid = refit_grid(target, gram, ints, grid)
        ints = descend(target, gram, ints, grid)
    return ints, grid
