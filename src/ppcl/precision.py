"""Arithmetic of trainings: float32 weights, matrix products in bfloat16 or TF32, and sums in a fixed order.

Trainable weights are always float32. In bfloat16, which has two to three significant digits, a weight of 0.02 would not
change when a step of 1e-5 is added. The frozen teacher may be in bfloat16. It never runs under autocast, so that it
computes the same in training as in every other stage, but for the TF32 of `fast_products`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ppcl.errors import UsageError


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


@contextmanager
def same_bits(device: torch.device, *, wanted: bool) -> Iterator[None]:
    """Let a CUDA device add up in a fixed order within the context, if `wanted`.

    By default the gradients of attention are added in the order in which threads finish, so that the last bits differ
    from run to run. A fixed order takes more time and, for attention, more memory. CPUs have one in any case.

    Raises `UsageError` if the context calls a function that torch has in no fixed order.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filling = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # with warn_only=True, attention would still add in any order
    settings.fill_uninitialized_memory = False  # which is to find bugs
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        function = str(error).split(" does not have")[0]
        raise UsageError(
            f"trainer.deterministic=true: torch adds up in no fixed order in {function}: drop it."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filling
