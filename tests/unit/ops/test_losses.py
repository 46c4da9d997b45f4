import math

import pytest
import torch

from ppcl.ops.losses import direction_loss, magnitude_loss, norm_ratio, relative_error, relative_error_per_token


def features(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 5, 7, generator=generator) for _ in range(2))


MASKS = [None, torch.tensor([[True] * 5, [True, True, False, False, False]])]


def per_token(student, teacher, mask, value):
    """Mean of value(s, t) over valid tokens, one at a time, on plain lists."""
    found = [
        value(student[b, t].tolist(), teacher[b, t].tolist())
        for b in range(student.shape[0])
        for t in range(student.shape[1])
        if mask is None or mask[b, t]
    ]
    return sum(found) / len(found)


def norm(values):
    return math.sqrt(sum(v * v for v in values))


def direction(s, t):
    return sum((a / norm(s) - b / norm(t)) ** 2 for a, b in zip(s, t, strict=True))


def relative(s, t):
    return norm([a - b for a, b in zip(s, t, strict=True)]) ** 2 / norm(t) ** 2


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (direction_loss, direction),
        (relative_error_per_token, relative),
        (magnitude_loss, lambda s, t: (math.log(norm(s)) - math.log(norm(t))) ** 2),
        (norm_ratio, lambda s, t: norm(s) / norm(t)),
    ],
)
def test_losses_equal_plain_loops(loss, value, mask):
    student, teacher = features()
    expected = per_token(student, teacher, mask, value)
    assert loss(student, teacher, mask).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [direction_loss, magnitude_loss, norm_ratio, relative_error_per_token])
def test_masked_tokens_change_nothing(loss):
    student, teacher = features()
    before = loss(student, teacher, MASKS[1]).item()
    student[~MASKS[1]], teacher[~MASKS[1]] = 1e4, -3.0
    assert loss(student, teacher, MASKS[1]).item() == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("scale", [0.1, 1.0, 40.0])
def test_direction_is_blind_to_scale_and_magnitude_sees_nothing_else(scale):
    teacher, _ = features()
    assert direction_loss(scale * teacher, teacher).item() == pytest.approx(0, abs=1e-10)
    assert magnitude_loss(scale * teacher, teacher).item() == pytest.approx(math.log(scale) ** 2, abs=1e-5)
    assert norm_ratio(scale * teacher, teacher).item() == pytest.approx(scale, rel=1e-5)


def test_relative_error_per_token_weighs_a_small_token_like_a_large_one():
    student, teacher = features()
    sizes = torch.tensor([1e-3, 1.0, 50.0, 1e3, 0.1])[None, :, None]
    expected = relative_error_per_token(student, teacher).item()
    assert relative_error_per_token(sizes * student, sizes * teacher).item() == pytest.approx(expected, rel=1e-4)
    assert relative_error(sizes * student, sizes * teacher).item() != pytest.approx(expected, rel=0.1)


def test_direction_loss_spans_zero_to_four():
    teacher, _ = features()
    orthogonal = torch.stack([-teacher[..., 1], teacher[..., 0]], dim=-1)
    assert direction_loss(-teacher, teacher).item() == pytest.approx(4, rel=1e-6)
    assert direction_loss(orthogonal, teacher[..., :2]).item() == pytest.approx(2, rel=1e-6)


def test_half_precision_features_are_compared_in_float32():
    """The squares of 300 overflow float16; the loss must not."""
    teacher = torch.full((1, 1, 8), 300.0, dtype=torch.float16)
    student = teacher.clone()
    student[..., 0] = -300
    assert direction_loss(student, teacher).item() == pytest.approx(4 / 8, rel=1e-3)
    assert norm_ratio(student, teacher).item() == pytest.approx(1, rel=1e-3)
    assert relative_error_per_token(student, teacher).item() == pytest.approx(4 / 8, rel=1e-3)


@pytest.mark.parametrize("loss", [direction_loss, relative_error_per_token])
@pytest.mark.parametrize("padding", [0.0, 1e4])
def test_the_loss_reaches_the_student_and_only_valid_tokens(loss, padding):
    student, teacher = features()
    student[~MASKS[1]], teacher[~MASKS[1]] = padding, 0.0
    student.requires_grad_()
    loss(student, teacher, MASKS[1]).backward()
    assert student.grad[~MASKS[1]].abs().max() == 0
    assert (student.grad[MASKS[1]].norm(dim=-1) > 0).all()


@pytest.mark.parametrize("loss", [direction_loss, magnitude_loss, norm_ratio, relative_error, relative_error_per_token])
@pytest.mark.parametrize("mask", MASKS)
def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch(loss, mask):
    """Each rank has a row, with 5 and 2 valid tokens; `average` is what all ranks would agree on."""
    student, teacher = features()
    student.requires_grad_(True)
    whole = loss(student, teacher, mask)
    rows = [
        (student[row : row + 1], teacher[row : row + 1], None if mask is None else mask[row : row + 1])
        for row in (0, 1)
    ]
    denominators = []
    for each in rows:
        loss(*each, lambda number: denominators.append(number) or number)
    agreed = torch.stack(denominators).float().mean() if denominators else None
    shared = torch.stack([loss(*each, lambda number: agreed) for each in rows]).mean()
    torch.testing.assert_close(shared, whole)
    if loss is not norm_ratio:  # which is only logged
        expected, found = (torch.autograd.grad(value, student)[0] for value in (whole, shared))
        torch.testing.assert_close(found, expected)
    if mask is not None:  # each its own denominator would be another loss
        assert torch.stack([loss(*each) for each in rows]).mean().item() != pytest.approx(whole.item(), rel=1e-3)
