"""Precision of trainable modules: weights in float32, their products in what is asked for.

A teacher may be in bfloat16; what learns may not, since a bfloat16 weight of 0.02 stays as it is when a step of 1e-5 is
taken. The teacher itself computes as it does in every stage, never under autocast.
"""

from __future__ import annotations

import torch


def computing(precision: str, device: torch.device) -> torch.autocast:
    """Where what learns computes.

    No copy of a weight outlives its use: parts take steps within a pass, and all copies at once would be a model more.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False)
