"""Ablation LP-a: an interval ends where the similarity falls below a threshold."""

from __future__ import annotations

from ppcl.methods.lp import Lp
from ppcl.methods.surrogates import Curve


def last_above(curve: Curve, u: int, last: int, threshold: float) -> int:
    """The end of the run from u on whose cka stays at `threshold` or above; u where none does."""
    v = u
    while v < last and curve(u, v + 1) >= threshold:
        v += 1
    return v


class LpA(Lp):
    """The rule of `method.threshold`."""

    def end_of(self, curve: Curve, u: int, last: int) -> int:
        return last_above(curve, u, last, self.config.threshold)
