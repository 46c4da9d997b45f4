"""Similarity of a teacher with its linear surrogates (paper Eq. 3-4).

A chain of linear probes is one linear map, so the surrogate's output at k is T_u's output times a
matrix: one teacher pass gives every cka(u, k), and no surrogate is ever run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ppcl.artifacts.probes import Probes
from ppcl.ops.cka import centre, cka, cka_of_linear_map

_HELD_MAPS = 256 << 20  # bytes of probes that are kept; more are read again for every block
_PRODUCTS = 256 << 20  # bytes of covariances that are multiplied at once

# cka[u][k] for u <= k; cka[u][u] = 1, where nothing is replaced yet.
Curve = Callable[[int, int], float]


def delta(curve: Curve, u: int, k: int) -> float:
    """Eq. 4: how much similarity the k-th replacement costs."""
    return -(curve(u, k) - curve(u, k - 1))


class SurrogateCurves:
    """Means over samples and noise levels of cka(u, k) (Eq. 3), for every stack, stream and u <= k.

    NaN where block u does not put the stream out, or where the stream ends before k.

    In float32: similarities are then right to 1e-6, also where single channels are a thousand times as large as
    others, and on most GPUs float64 is a sixtieth as fast.
    """

    def __init__(self, probes: Probes, num_layers: dict[str, int], *, debiased: bool) -> None:
        self.num_layers, self.debiased = num_layers, debiased
        self.precision = torch.float64 if debiased else torch.float32
        self.weights = probes.weights
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.counts: dict[tuple[str, str], Tensor] = {}
        self._maps: dict[str, Tensor] = {}

    def _map(self, key: str) -> Tensor:
        """A probe as x -> x A with A = I + W^T; its bias is the same for all tokens, so centring drops it."""
        if key in self._maps:
            return self._maps[key]
        weight = self.weights[key]
        found = torch.eye(len(weight), dtype=self.precision) + weight.T.to(self.precision)
        if len(self.weights) * found.nbytes <= _HELD_MAPS:
            self._maps[key] = found
        return found

    @torch.no_grad()
    def add(
        self, stack: str, u: int, outputs: Sequence[dict[str, Tensor]], masks: Sequence[dict[str, Tensor | None]]
    ) -> None:
        """Add the outputs `[B, tokens, D]` of block u per stream, of every batch."""
        for stream in outputs[0]:
            features, valid = [each[stream] for each in outputs], [each[stream] for each in masks]
            layers = self.num_layers[stack]
            sums = self.sums.setdefault((stack, stream), torch.full((layers, layers), torch.nan, dtype=torch.float64))
            sums[u, u:] = torch.nan_to_num(sums[u, u:]) + self._row(stack, u, stream, features, valid)
            self.counts.setdefault((stack, stream), torch.zeros(layers, 1))[u] += sum(map(len, features))

    def _row(
        self, stack: str, u: int, stream: str, features: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> Tensor:
        """Sums over all samples of cka(u, k), for k from u on; NaN from where the stream ends."""
        pairs = list(zip(features, masks, strict=True))
        centred = (centre(each.to(self.precision), mask) for each, mask in pairs)
        of_chain: Callable[[Tensor], Tensor]
        if not self.debiased and max(each.shape[1] for each in features) >= features[0].shape[2]:
            of_chain = _by_covariance(centred)
        else:
            valid = [each.new_full(each.shape[:1], each.shape[1]) if m is None else m.sum(dim=1) for each, m in pairs]
            of_chain = _by_tokens(centred, torch.cat(valid), self.debiased)
        values = [torch.tensor(float(sum(map(len, features))), dtype=torch.float64)]
        chain: Tensor | None = None
        for k in range(u + 1, self.num_layers[stack]):
            if (key := f"{stack}.{k}.{stream}") not in self.weights:
                break
            step = self._map(key).to(features[0].device)
            chain = step if chain is None else chain @ step
            values.append(of_chain(chain).sum().cpu())
        return pad(torch.stack(values), (0, self.num_layers[stack] - u - len(values)), value=torch.nan)

    def streams(self, stack: str) -> list[str]:
        """The streams of a stack, by name."""
        return sorted(name for s, name in self.sums if s == stack)

    def mean(self, stack: str, stream: str) -> Tensor:
        """cka `[M, M]` of a stream, or the mean of those that are there; NaN below the diagonal.

        `stream` is one of the stack's, or `mean`; a stack without it is taken by its mean.
        """
        names = self.streams(stack)
        chosen = [self.sums[stack, n] / self.counts[stack, n] for n in names if stream == n or stream not in names]
        if not chosen:  # a stack without blocks
            return torch.full((self.num_layers[stack], self.num_layers[stack]), torch.nan, dtype=torch.float64)
        return torch.stack(chosen).nanmean(dim=0)


def blocks_with(table: Tensor) -> range:
    """The blocks from the first to the last that a stream, or a mean of some, goes through; it begins and ends once."""
    found = table.diagonal().isfinite().nonzero().flatten().tolist()
    return range(found[0], found[-1] + 1) if found else range(0)


def _by_covariance(centred: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """cka `[samples]` of batches `[B, T, D]` with their products with a matrix: by D x D a sample, a few at a time."""
    covariances = torch.cat([each.mT @ each for each in centred])
    parts = covariances.split(max(1, _PRODUCTS // covariances[0].nbytes))

    def of_chain(chain: Tensor) -> Tensor:
        kernel = chain @ chain.T
        return torch.cat([cka_of_linear_map(part, kernel) for part in parts])

    return of_chain


def _by_tokens(centred: Iterable[Tensor], valid: Tensor, debiased: bool) -> Callable[[Tensor], Tensor]:
    """The same by tokens, of which `valid` `[samples]` are no padding; what is added to the shorter ones is zero."""
    batches = list(centred)
    longest = max(each.shape[1] for each in batches)
    features = torch.cat([pad(each, (0, 0, 0, longest - each.shape[1])) for each in batches])
    return lambda chain: cka(features, features @ chain, valid, debiased=debiased)


def rows_of(table: Tensor) -> list[list[float | None]]:
    """A table as nested lists, None for NaN."""
    return [[None if value != value else value for value in row] for row in table.tolist()]
