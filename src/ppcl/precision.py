"""Precision of trainable modules: float32 weights, and matrix products in bfloat16 if that is asked for.

Trainable weights are always float32. In bfloat16, which has two to three significant digits, a weight of 0.02 would not
change when a step of 1e-5 is added. The frozen teacher may be in bfloat16. It never runs under autocast, so that it
computes the same in training as in every other stage, but for the TF32 of `fast_products`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def computing(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast context for trainable modules: bfloat16 if `precision` is `bf16-mixed`, else disabled.

    The weight cache of autocast is off, for two reasons. It would hold bfloat16 copies of all parts at once, as much
    memory as another model. And weights are updated during the teacher's forward, after which cached copies are stale.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False)


@contextmanager
def fast_products(device: torch.device, *, wanted: bool = True) -> Iterator[None]:
    """Let a CUDA device multiply float32 matrices in TF32 within the context, if `wanted`.

    TF32 rounds factors to 10 bits, as many as float16 has, and adds in float32. That suits trainings, which take many
    small steps in noisy directions, and is several times as fast. It does not suit what is measured once: CKA, which
    tells 0.999 from 0.998, and held-out losses. These run outside of the context. Least squares add up in float64,
    which TF32 does not touch. Other devices, and products in bfloat16, stay as they are.
    """
    before = torch.get_float32_matmul_precision()
    if wanted and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
