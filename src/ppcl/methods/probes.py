"""Fits residual linear probes, one per block and stream, and measures how well they fit (paper Eq. 1-2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ppcl.data.batches import TrainingBatch
from ppcl.errors import UsageError
from ppcl.families.base import Family
from ppcl.ops.finite import all_finite
from ppcl.ops.least_squares import NormalEquations, in_chunks
from ppcl.ops.losses import own
from ppcl.taps import observe_abreast

Changes = Iterable[tuple[Tensor, Tensor]]


def changes(before: Tensor, after: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the valid tokens of `before` as rows `[T, D]`, and the same rows of `after - before`, in float32.

    `before`, `after`: features `[B, tokens, D]`. `mask`: the valid tokens `[B, tokens]`; None for all.
    """
    for x, y in rows(before, after, mask):
        yield x, y - x


def rows(before: Tensor, after: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the valid tokens of `before` as rows `[T, D]`, and the same rows of `after`, in float32.

    A few rows come at a time, so that these copies take little memory however large the batch is.
    """
    for x, y, *masks in in_chunks(before, after, *([] if mask is None else [mask])):
        for some, later in in_chunks(_rows(x, *masks), _rows(y, *masks)):
            yield some.float(), later.float()


def _rows(features: Tensor, mask: Tensor | None = None) -> Tensor:
    return features.flatten(0, 1) if mask is None else features[mask]


@torch.no_grad()
def pairs(
    family: Family, transformer: nn.Module, batches: Sequence[TrainingBatch]
) -> Iterator[tuple[int, str, Changes]]:
    """Yield `(batch number, key, changes)` for every block, stream and batch.

    `changes` are the block's input tokens `x` and its outputs minus its inputs `dx`, see the function of that name.
    `key` is `STACK.INDEX.STREAM`. All batches of a block come before the next block. Streams that are not both an input
    and an output are skipped.
    """
    masks = [family.masks(batch.inputs) for batch in batches]
    inputs = [batch.inputs for batch in batches]
    for number, call in observe_abreast(family, transformer, inputs, size_keys="probe.batch_size or probe.num_batches"):
        for stream, before in call.inputs.items():
            if stream not in call.outputs:
                continue
            moved = changes(before, call.outputs[stream], masks[number][stream])
            yield number, f"{call.stack}.{call.index}.{stream}", moved


@dataclass
class Residual:
    """Accumulates ||l_i(x) - T_i||^2 / ||T_i - T_{i-1}||^2 over tokens; 1 means no better than the identity."""

    error: float = 0.0
    size: float = 0.0

    def add(self, probe: tuple[Tensor, Tensor], moved: Changes) -> None:
        """Add tokens `x` `[T, D]` and the changes `dx` that `probe`, a weight and a bias, should predict."""
        weight, bias = probe
        for x, dx in moved:
            weight, bias = weight.to(x.device), bias.to(x.device)
            self.error += (x @ weight.T + bias - dx).double().square().sum().item()
            self.size += dx.double().square().sum().item()

    @classmethod
    def together(cls, several: Sequence[Residual]) -> Residual:
        """Return the residual of all tokens that were added to any of `several`."""
        return cls(sum(one.error for one in several), sum(one.size for one in several))

    @property
    def value(self) -> float:
        """The residual of all tokens added so far; 0 if they do not change in the block."""
        return self.error / self.size if self.size else 0.0


def solved(system: NormalEquations, key: str, *, ridge: float, bias: bool = True) -> tuple[Tensor, Tensor]:
    """Return the weight and bias that `system` gives; `UsageError` if its sums are not finite.

    `key`: the block and stream, or the projector, that it is of, for the message.
    """
    if not (all_finite(system.gram) and all_finite(system.cross)):
        raise UsageError(
            f"the teacher's activations at {key} are not finite: look for NaN and for values that overflow in its "
            "weights and in the data, or use a model.dtype of a wider range."
        )
    return system.solve(ridge=ridge, bias=bias)


@dataclass
class Fit:
    """The probe x -> x + x W^T + b of one block and stream, and its residual on held-out batches."""

    key: str
    weight: Tensor
    bias: Tensor
    residual: Residual


def fit_probes(
    family: Family,
    transformer: nn.Module,
    batches: Sequence[TrainingBatch],
    heldout: Sequence[TrainingBatch] = (),
    *,
    ridge: float,
    bias: bool,
    total: Callable[[Tensor], Tensor] = own,
) -> Iterator[Fit]:
    """Yield the probe of every block and stream, fitted by least squares (Eq. 1): x -> x + x W^T + b, `W` is `[D, D]`.

    The input of probe i is the teacher's own T_{i-1}, so one pass of the teacher fits all probes. The statistics of one
    block are in memory at a time.

    `heldout`: batches for the residuals. `ridge`: the damping, relative to the mean diagonal of X^T X. `bias`: whether
    b is fitted; otherwise it is 0. `total`: adds the statistics of a block up over ranks that have different batches.
    All ranks then get the same probes, and each gets the residuals on its own held-out batches.
    """
    equations: dict[str, NormalEquations] = {}
    fits: dict[str, Fit] = {}
    final = len(batches) + len(heldout) - 1
    for number, key, moved in pairs(family, transformer, [*batches, *heldout]):
        if number < len(batches):
            for x, dx in moved:
                if key not in equations:
                    equations[key] = NormalEquations(x.shape[1], dx.shape[1], x.device)
                equations[key].add(x, dx)
        else:
            fits[key].residual.add((fits[key].weight, fits[key].bias), moved)
        if number == len(batches) - 1:
            system = equations.pop(key)
            system.gram, system.cross = total(system.gram), total(system.cross)
            weight, offset = solved(system, key, ridge=ridge, bias=bias)
            fits[key] = Fit(key, weight.float(), offset.float(), Residual())
        if number == final:
            yield fits.pop(key)


def train_probes(
    family: Family,
    transformer: nn.Module,
    batches: Iterable[TrainingBatch],
    probes: dict[str, tuple[Tensor, Tensor]],
    *,
    lr: float,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Train `probes` by Adam on L_fit = ||l_i(T_{i-1}) - T_i||^2 (Eq. 2), one step per batch, and return them.

    `probes`: weight `[D, D]` and bias `[D]` by key, of all blocks and streams or of some. They share no gradient, so
    each is trained as if alone.
    """
    maps = {key: nn.Linear(weight.shape[1], weight.shape[0]) for key, (weight, _) in probes.items()}
    for key, (weight, bias) in probes.items():
        maps[key].load_state_dict({"weight": weight, "bias": bias})
    optimizer = torch.optim.Adam([p for linear in maps.values() for p in linear.parameters()], lr=lr)

    for batch in batches:
        optimizer.zero_grad()
        for _, key, moved in pairs(family, transformer, [batch]):
            if key not in maps:
                continue
            count = 0
            for x, dx in moved:
                (maps[key](x.cpu()) - dx.cpu()).square().sum().backward()
                count += len(x)
            for parameter in maps[key].parameters():
                assert parameter.grad is not None
                parameter.grad /= count  # the gradient of the mean over all tokens
        optimizer.step()
    return {key: (linear.weight.detach(), linear.bias.detach()) for key, linear in maps.items()}


def relative_residuals(
    family: Family,
    transformer: nn.Module,
    batches: Sequence[TrainingBatch],
    probes: Mapping[str, tuple[Tensor, Tensor]],
) -> dict[str, float]:
    """Return the relative residual (see `Residual`) of each of `probes` on `batches`, by key."""
    residuals: dict[str, Residual] = {}
    for _, key, moved in pairs(family, transformer, batches):
        if key in probes:
            residuals.setdefault(key, Residual()).add(probes[key], moved)
    return {key: residual.value for key, residual in residuals.items()}
