"""Precision of trainable modules: float32 weights, and matrix products in bfloat16 if that is asked for.

Trainable weights are always float32. In bfloat16, which has two to three significant digits, a weight of 0.02 would not
change when a step of 1e-5 is added. The frozen teacher may be in bfloat16. It never runs under autocast, so that it
computes the same in training as in every other stage.
"""

from __future__ import annotations

import torch


def computing(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast context for trainable modules: bfloat16 if `precision` is `bf16-mixed`, else disabled.

    The weight cache of autocast is off, for two reasons. It would hold bfloat16 copies of all parts at once, as much
    memory as another model. And weights are updated during the teacher's forward, after which cached copies are stale.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False)
