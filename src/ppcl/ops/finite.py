"""Tells numbers from NaN and infinity."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def all_finite(value: Tensor) -> bool:
    """Return whether all numbers in `value` are finite. A tensor without data, of a dry run, has no others."""
    return isinstance(value, FakeTensor) or bool(value.isfinite().all())
