"""Ablation LP-a: an interval ends where the similarity falls below a threshold."""

from __future__ import annotations

from ppcl.methods.lp import Lp
from ppcl.methods.surrogates import Curve


def last_above(curve: Curve, u: int, last: int, threshold: float) -> int:
    """Return the last v such that cka(u, k) is at least `threshold` for every k from u + 1 to v; u if there is none."""
    v = u
    while v < last and curve(u, v + 1) >= threshold:
        v += 1
    return v


class LpA(Lp):
    """Ends an interval before the first block whose cka is below `method.threshold`."""

    reads = (*Lp.reads, "threshold")

    def end_of(self, curve: Curve, u: int, last: int) -> int:
        return last_above(curve, u, last, self.config.threshold)
