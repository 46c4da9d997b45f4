"""The losses that students and pruned blocks can learn from, by the names of `distill.losses`.

To add one: write a function of student and teacher features, put it into `LOSSES`, and give it a weight in
`distill.losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ppcl.config import DistillConfig
from ppcl.ops.losses import Average, direction_loss, magnitude_loss, relative_error

# Student and teacher features `[B, tokens, D]`, valid tokens `[B, tokens]` or None for all, and the mean over ranks.
Loss = Callable[[Tensor, Tensor, Tensor | None, Average], Tensor]
LOSSES: dict[str, Loss] = {
    "direction": direction_loss,  # Eq. 6
    "magnitude": magnitude_loss,
    "relative": relative_error,
}
MAIN = "direction"  # logged under the stream's own name

Terms = dict[str, Tensor]


def distill_losses(config: DistillConfig) -> dict[str, float]:
    """The weight of every loss that a block's output learns from; `magnitude_weight` is the older key for one."""
    weights = dict(config.losses)
    if config.magnitude_weight:
        weights["magnitude"] = weights.get("magnitude", 0.0) + config.magnitude_weight
    return weights


def stream_terms(
    weights: Mapping[str, float],
    stream: str,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    average: Average,
) -> Terms:
    """The weighted losses of one stream, by the names they are logged under; those without weight are left out."""
    return {
        stream if name == MAIN else f"{stream}_{name}": weight * LOSSES[name](student, teacher, mask, average)
        for name, weight in weights.items()
        if weight
    }


def with_loss(descended: Mapping[str, Tensor], logged: Mapping[str, Tensor]) -> Terms:
    """All terms to be logged, and as `loss` the sum of those in `descended`."""
    return {**descended, **logged, "loss": torch.stack(list(descended.values())).sum()}
