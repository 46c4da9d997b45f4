"""Distillation losses (paper Eq. 6 and 12) and the norm ratio, of student and teacher features.

`mask` marks the valid tokens; None means that all are. Where ranks share a batch, `average` replaces a denominator by
its mean over them. No denominator depends on the student, so the mean of a loss or of its gradient over ranks is
exactly that of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

Average = Callable[[Tensor], Tensor]


def own(number: Tensor) -> Tensor:
    """Return `number`: the `average` for a batch that is not shared among ranks."""
    return number


def _mean_over_tokens(values: Tensor, mask: Tensor | None, average: Average) -> Tensor:
    if mask is None:
        if average is own:
            return values.mean()
        return values.sum() / average(torch.tensor(values.numel(), device=values.device))  # as others count by a mask
    return (values * mask).sum() / average(mask.sum())


def direction_loss(
    student: Float[Tensor, "batch tokens dim"],
    teacher: Float[Tensor, "batch tokens dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    average: Average = own,
) -> Float[Tensor, ""]:
    """Return the mean over valid tokens of ||s/||s|| - t/||t|| ||^2 (Eq. 6), in float32, between 0 and 4.

    It compares directions only: the student's magnitude is left free.
    """
    difference = F.normalize(student.float(), dim=-1) - F.normalize(teacher.float(), dim=-1)
    return _mean_over_tokens(difference.square().sum(dim=-1), mask, average)


def magnitude_loss(
    student: Float[Tensor, "batch tokens dim"],
    teacher: Float[Tensor, "batch tokens dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    average: Average = own,
) -> Float[Tensor, ""]:
    """Return the mean over valid tokens of (log ||s|| - log ||t||)^2, the difference that `direction_loss` ignores."""
    ratio = student.float().norm(dim=-1).log() - teacher.float().norm(dim=-1).log()
    return _mean_over_tokens(ratio.square(), mask, average)


@torch.no_grad()
def norm_ratio(
    student: Float[Tensor, "batch tokens dim"],
    teacher: Float[Tensor, "batch tokens dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    average: Average = own,
) -> Float[Tensor, ""]:
    """Return the mean over valid tokens of ||s|| / ||t||, which is 1 if magnitudes agree. It has no gradient."""
    return _mean_over_tokens(student.float().norm(dim=-1) / teacher.float().norm(dim=-1), mask, average)


def relative_error_per_token(
    student: Float[Tensor, "batch tokens dim"],
    teacher: Float[Tensor, "batch tokens dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    average: Average = own,
) -> Float[Tensor, ""]:
    """Return the mean over valid tokens of ||s - t||^2 / ||t||^2, in float32.

    Every token counts the same, however large its features are. `relative_error` weighs tokens by their size, so that
    a few large ones can decide it. Puzzle (Model-Optimizer) distils blocks with this loss.
    """
    student, teacher = student.float(), teacher.float()
    size = teacher.square().sum(dim=-1).clamp_min(1e-8)  # padded tokens may be zero
    return _mean_over_tokens((student - teacher).square().sum(dim=-1) / size, mask, average)


def relative_error(
    student: Float[Tensor, "batch tokens dim"],
    teacher: Float[Tensor, "batch tokens dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    average: Average = own,
) -> Float[Tensor, ""]:
    """Return ||s - t||^2 / ||t||^2, both summed over valid tokens, in float32.

    This is the distance of Eq. 12, relative to the teacher's features so that their scale does not matter.
    """
    student, teacher = student.float(), teacher.float()
    weight = 1.0 if mask is None else mask.unsqueeze(-1)
    return ((student - teacher).square() * weight).sum() / average((teacher.square() * weight).sum())


def masked_error(
    student: Float[Tensor, "batch tokens dim"], teacher: Float[Tensor, "batch tokens dim"], sigmas: float
) -> Float[Tensor, ""]:
    """Return the mean of (m_s s - m_t t)^2 over all elements, in float32 (TinyFusion's masked distillation).

    The masks m_s and m_t are 1 for values nearer than `sigmas` standard deviations to the mean of their sample, over
    its tokens and features, and 0 for extreme ones. The student's mask does not depend on the teacher.
    """
    return (_without_extremes(student.float(), sigmas) - _without_extremes(teacher.float(), sigmas)).square().mean()


def _without_extremes(features: Tensor, sigmas: float) -> Tensor:
    with torch.no_grad():
        deviation, mean = torch.std_mean(features, dim=(1, 2), correction=0, keepdim=True)
        kept = (features - mean).abs() < sigmas * deviation
    return features * kept
