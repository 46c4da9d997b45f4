"""Similarity of the teacher to its linear surrogates (paper Eq. 3-4).

In the surrogate for (u, k), blocks u+1 to k are replaced by their linear probes. A chain of linear probes is one linear
map, so the output of the surrogate at k is the output of T_u times a matrix. One pass of the teacher therefore gives
cka(u, k) for all u and k, and no surrogate is ever run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ppcl.artifacts.probes import Probes
from ppcl.ops.cka import centre, cka, cka_of_linear_map

_HELD_MAPS = 256 << 20  # the most bytes of probe matrices to cache; if all need more, each is read whenever needed
_PRODUCTS = 256 << 20  # the most bytes of covariances to multiply at once

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
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.counts: dict[tuple[str, str], Tensor] = {}
        self._maps: dict[str, Tensor] = {}

    def _map(self, key: str) -> Tensor:
        """Return a probe as the matrix A = I + W^T of x -> x A; its bias is left out, since centring cancels it."""
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
        """Add block u's output streams `[B, tokens, D]` of every batch; `masks` has their valid tokens."""
        for stream in outputs[0]:
            features, valid = [each[stream] for each in outputs], [each[stream] for each in masks]
            layers = self.num_layers[stack]
            sums = self.sums.setdefault((stack, stream), torch.full((layers, layers), torch.nan, dtype=torch.float64))
            sums[u, u:] = torch.nan_to_num(sums[u, u:]) + self._row(stack, u, stream, features, valid)
            self.counts.setdefault((stack, stream), torch.zeros(layers, 1))[u] += sum(map(len, features))

    def _row(
        self, stack: str, u: int, stream: str, features: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> Tensor:
        """Return the sums over samples of cka(u, k) for k = u, u + 1, ...; NaN where the stream has ended."""
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


def blocks_with(table: Tensor) -> range:
    """Return the range of blocks with a similarity in `table`, those that the stream passes through."""
    found = table.diagonal().isfinite().nonzero().flatten().tolist()
    return range(found[0], found[-1] + 1) if found else range(0)


def _by_covariance(centred: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function from a matrix A to CKA(X, X A) `[samples]`, by covariances; `centred`: batches `[B, T, D]`."""
    covariances = torch.cat([each.mT @ each for each in centred])
    parts = covariances.split(max(1, _PRODUCTS // covariances[0].nbytes))

    def of_chain(chain: Tensor) -> Tensor:
        kernel = chain @ chain.T
        return torch.cat([cka_of_linear_map(part, kernel) for part in parts])

    return of_chain


def _by_tokens(centred: Iterable[Tensor], valid: Tensor, debiased: bool) -> Callable[[Tensor], Tensor]:
    """Return the same function as `_by_covariance`, by tokens. `valid`: the number of valid tokens `[samples]`."""
    batches = list(centred)
    longest = max(each.shape[1] for each in batches)
    features = torch.cat([pad(each, (0, 0, 0, longest - each.shape[1])) for each in batches])
    return lambda chain: cka(features, features @ chain, valid, debiased=debiased)


def rows_of(table: Tensor) -> list[list[float | None]]:
    """Return a table as nested lists with None for NaN, as JSON needs it."""
    return [[None if value != value else value for value in row] for row in table.tolist()]
