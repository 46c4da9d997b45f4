"""Losses between a block's output and the teacher's, by the names that `distill.losses` gives weights to.

To add a loss: write a function of type `Loss`, add it to `LOSSES`, and give it a weight in `distill.losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ppcl.config import DistillConfig
from ppcl.ops.losses import Average, direction_loss, magnitude_loss, relative_error, relative_error_per_token

# loss(student, teacher, mask, average) -> scalar. Features are `[B, tokens, D]`. The mask `[B, tokens]` marks valid
# tokens, None means all. `average` takes a number's mean over the ranks that share the batch.
Loss = Callable[[Tensor, Tensor, Tensor | None, Average], Tensor]
LOSSES: dict[str, Loss] = {
    "direction": direction_loss,  # Eq. 6
    "magnitude": magnitude_loss,
    "relative": relative_error,
    "relative_per_token": relative_error_per_token,
}
MAIN = "direction"  # logged under the stream's name alone

Terms = dict[str, Tensor]


def distill_losses(config: DistillConfig) -> dict[str, float]:
    """Return the weight of each loss by name: `distill.losses`, plus `distill.magnitude_weight` for `magnitude`.

    `distill.magnitude_weight` is an older key for the same weight.
    """
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
    """Return the weighted losses of one stream, scalars by their logged names.

    `weights`: by loss name; a loss with weight 0 is not computed. `stream`: `image` or `text`. `student`, `teacher`,
    `mask`, `average`: as in `Loss`. The direction loss is logged as the stream's name, another as `STREAM_LOSS`.
    """
    return {
        stream if name == MAIN else f"{stream}_{name}": weight * LOSSES[name](student, teacher, mask, average)
        for name, weight in weights.items()
        if weight
    }


def with_loss(descended: Mapping[str, Tensor], logged: Mapping[str, Tensor]) -> Terms:
    """Return the scalars of both mappings, and under `loss` the sum of those in `descended`, to be back-propagated."""
    return {**descended, **logged, "loss": torch.stack(list(descended.values())).sum()}
