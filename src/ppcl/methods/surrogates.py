"""Similarity of the teacher to its linear surrogates (paper Eq. 3-4).

In the surrogate for (u, k), blocks u+1 to k are replaced by their linear probes. A chain of linear probes is one linear
map, so the output of the surrogate at k is the output of T_u times a matrix. One pass of the teacher therefore gives
cka(u, k) for all u and k, and no surrogate is ever run. Similarities are sums over samples, so the samples may come in
parts, each with a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import pad

from ppcl.artifacts.probes import Probes
from ppcl.errors import UsageError
from ppcl.ops.cka import centre, cka, cka_of_linear_map
from ppcl.ops.finite import all_finite
from ppcl.ops.least_squares import in_chunks
from ppcl.taps import free_bytes

_PRODUCTS = 256 << 20  # the most bytes of covariances, or of centred tokens, to multiply at once

# curve(u, k) is cka(u, k) for u <= k; curve(u, u) is 1, as nothing is replaced.
Curve = Callable[[int, int], float]


def delta(curve: Curve, u: int, k: int) -> float:
    """Return the similarity that is lost when block k is replaced too, -(cka(u, k) - cka(u, k - 1)) (Eq. 4)."""
    return -(curve(u, k) - curve(u, k - 1))


class SurrogateCurves:
    """Accumulates cka(u, k) (Eq. 3), averaged over samples and noise levels, for all stacks, streams and u <= k.

    A value is NaN if block u does not output the stream, or if the stream ends before block k.

    `num_layers`: the number of blocks by stack. `debiased`: whether to use the debiased CKA, in float64.
    Otherwise features are float32: similarities are then exact to 1e-6 even if single channels are a thousand times as
    large as others, and on most GPUs float64 is about sixty times slower.
    """

    def __init__(self, probes: Probes, num_layers: dict[str, int], *, debiased: bool) -> None:
        self.num_layers, self.debiased = num_layers, debiased
        self.precision = torch.float64 if debiased else torch.float32
        self.weights = probes.weights
        # All probe matrices are cached if they need no more than this; otherwise each is read whenever it is needed.
        self.most_held = max(256 << 20, free_bytes(torch.device("cpu")) / 8)
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.counts: dict[tuple[str, str], Tensor] = {}
        self._maps: dict[str, Tensor] = {}

    def _map(self, key: str) -> Tensor:
        """Return a probe as the matrix A = I + W^T of x -> x A; its bias is left out, since centring cancels it."""
        if key in self._maps:
            return self._maps[key]
        weight = self.weights[key]
        if not all_finite(weight):
            _refuse(f"the probe {key}")
        found = torch.eye(len(weight), dtype=self.precision) + weight.T.to(self.precision)
        if len(self.weights) * found.nbytes <= self.most_held:
            self._maps[key] = found
        return found

    @torch.no_grad()
    def add(
        self, stack: str, u: int, outputs: Sequence[dict[str, Tensor]], masks: Sequence[dict[str, Tensor | None]]
    ) -> None:
        """Add block u's output streams `[B, tokens, D]` of some batches; `masks` has their valid tokens."""
        for stream in outputs[0]:
            features, valid = [each[stream] for each in outputs], [each[stream] for each in masks]
            if not all(map(all_finite, features)):
                _refuse(f"the output of the teacher's block {stack}.{u}.{stream}")
            layers = self.num_layers[stack]
            sums = self.sums.setdefault((stack, stream), torch.full((layers, layers), torch.nan, dtype=torch.float64))
            sums[u, u:] = torch.nan_to_num(sums[u, u:]) + self._row(stack, u, stream, features, valid)
            self.counts.setdefault((stack, stream), torch.zeros(layers, 1))[u] += sum(map(len, features))

    def add_up(self, gathered: Callable[[Any], list[Any]]) -> None:
        """Add what all ranks have accumulated. `gathered`: returns the value of every rank."""
        parts = gathered((self.sums, self.counts))
        for key in dict.fromkeys(key for sums, _ in parts for key in sums):
            tables = torch.stack([sums[key] for sums, _ in parts if key in sums])
            self.sums[key] = tables.nansum(dim=0).masked_fill(tables.isnan().all(dim=0), torch.nan)
            self.counts[key] = torch.stack([counts[key] for _, counts in parts if key in counts]).sum(dim=0)

    def held_bytes(self, features: Tensor) -> int:
        """Return the bytes that `add` holds beside output streams `[B, tokens, D]`, while it works on one of them."""
        count, tokens, dim = features.shape
        return count * (tokens if self.debiased else min(tokens, dim)) * dim * self.precision.itemsize

    def _row(
        self, stack: str, u: int, stream: str, features: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> Tensor:
        """Return the sums over samples of cka(u, k) for k = u, u + 1, ...; NaN where the stream has ended."""
        similarity = self._similarity(features, masks)
        values = [torch.tensor(float(sum(map(len, features))), dtype=torch.float64)]
        chain: Tensor | None = None
        for k in range(u + 1, self.num_layers[stack]):
            if (key := f"{stack}.{k}.{stream}") not in self.weights:
                break
            step = self._map(key).to(features[0].device)
            chain = step if chain is None else chain @ step
            values.append(similarity(chain).sum().cpu())
        return pad(torch.stack(values), (0, self.num_layers[stack] - u - len(values)), value=torch.nan)

    def _similarity(self, features: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Callable[[Tensor], Tensor]:
        """Return a function from a matrix A to CKA(X, X A) `[samples]` of all batches of features X `[B, tokens, D]`.

        Of each sample either its covariance is held or, where that is larger or does not suffice, its centred tokens.
        """
        first, count = features[0], sum(map(len, features))
        longest, dim = max(each.shape[1] for each in features), first.shape[2]
        by_covariance = not self.debiased and longest >= dim
        held = first.new_zeros(count, dim if by_covariance else longest, dim, dtype=self.precision)
        tokens = first.new_zeros(count, dtype=torch.float64)
        start = 0
        for batch in zip(features, masks, strict=True):
            for each, *mask in in_chunks(*(part for part in batch if part is not None)):
                centred, stop = centre(each.to(self.precision), *mask), start + len(each)
                tokens[start:stop] = mask[0].sum(dim=1) if mask else each.shape[1]
                if by_covariance:
                    held[start:stop] = centred.mT @ centred
                else:
                    held[start:stop, : each.shape[1]] = centred
                start = stop
        groups = max(1, _PRODUCTS // held[0].nbytes)
        parts = list(zip(held.split(groups), tokens.split(groups), strict=True))

        def of_chain(chain: Tensor) -> Tensor:
            if by_covariance:
                kernel = chain @ chain.T
                return torch.cat([cka_of_linear_map(part, kernel) for part, _ in parts])
            return torch.cat([cka(part, part @ chain, valid, debiased=self.debiased) for part, valid in parts])

        return of_chain

    def streams(self, stack: str) -> list[str]:
        """Return the names of a stack's streams."""
        return sorted(name for s, name in self.sums if s == stack)

    def mean(self, stack: str, stream: str) -> Tensor:
        """Return the table of cka(u, k), `[M, M]` for M blocks, NaN below the diagonal.

        `stream`: a stream of the stack. Any other name, such as `mean`, gives the mean over the stack's streams.
        """
        names = self.streams(stack)
        chosen = [self.sums[stack, n] / self.counts[stack, n] for n in names if stream == n or stream not in names]
        if not chosen:  # a stack without blocks
            return torch.full((self.num_layers[stack], self.num_layers[stack]), torch.nan, dtype=torch.float64)
        return torch.stack(chosen).nanmean(dim=0)


def _refuse(what: str) -> NoReturn:
    raise UsageError(
        f"{what} has values that are not finite, so that no intervals can be found: look for NaN and for values that "
        "overflow in the teacher's weights and in the data."
    )


def blocks_with(table: Tensor) -> range:
    """Return the range of blocks with a similarity in `table`, those that the stream passes through."""
    found = table.diagonal().isfinite().nonzero().flatten().tolist()
    return range(found[0], found[-1] + 1) if found else range(0)


def rows_of(table: Tensor) -> list[list[float | None]]:
    """Return a table as nested lists with None for NaN, as JSON needs it."""
    return [[None if value != value else value for value in row] for row in table.tolist()]
