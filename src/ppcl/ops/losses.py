"""Distillation losses (paper Eq. 6): direction of features per token, magnitude left free.

Where ranks share a batch, `average` makes of a denominator its mean over them. No denominator depends on the student,
so that the mean over ranks of a loss, or of its gradient, is that of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

Average = Callable[[Tensor], Tensor]


def own(number: Tensor) -> Tensor:
    """The average of a batch that is not shared: the number itself."""
    return number


def _mean_over_tokens(values: Tensor, mask: Tensor | None, average: Average) -> Tensor:
    if mask is None:
        return values.mean()  # of as many tokens on each rank
    return (values * mask).sum() / average(mask.sum())


def direction_loss(
    student: Float[Tensor, "batch tokens dim"],
    teacher: Float[Tensor, "batch tokens dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    average: Average = own,
) -> Float[Tensor, ""]:
    """Mean over valid tokens of ||s/||s|| - t/||t|| ||^2, in float32; lies in [0, 4]."""
    difference = F.normalize(student.float(), dim=-1) - F.normalize(teacher.float(), dim=-1)
    return _mean_over_tokens(difference.square().sum(dim=-1), mask, average)


def magnitude_loss(
    student: Float[Tensor, "batch tokens dim"],
    teacher: Float[Tensor, "batch tokens dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    average: Average = own,
) -> Float[Tensor, ""]:
    """Mean over valid tokens of (log ||s|| - log ||t||)^2: what `direction_loss` cannot see."""
    ratio = student.float().norm(dim=-1).log() - teacher.float().norm(dim=-1).log()
    return _mean_over_tokens(ratio.square(), mask, average)


@torch.no_grad()
def norm_ratio(
    student: Float[Tensor, "batch tokens dim"],
    teacher: Float[Tensor, "batch tokens dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    average: Average = own,
) -> Float[Tensor, ""]:
    """Mean over valid tokens of ||s|| / ||t||; 1 where magnitudes agree."""
    return _mean_over_tokens(student.float().norm(dim=-1) / teacher.float().norm(dim=-1), mask, average)


def relative_error(
    student: Float[Tensor, "batch tokens dim"],
    teacher: Float[Tensor, "batch tokens dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    average: Average = own,
) -> Float[Tensor, ""]:
    """||s - t||^2 / ||t||^2 over valid tokens, in float32: Eq. 12's distance on a scale no model's norms set."""
    student, teacher = student.float(), teacher.float()
    weight = 1.0 if mask is None else mask.unsqueeze(-1)
    return ((student - teacher).square() * weight).sum() / average((teacher.square() * weight).sum())
