"""Losses by name: which terms are descended, which are only logged."""

import torch

from ppcl.config import DistillConfig
from ppcl.distill.losses import distill_losses, stream_terms, with_loss
from ppcl.ops.losses import direction_loss, magnitude_loss, own, relative_error


def test_each_loss_is_weighted_and_logged_by_its_name():
    student, teacher = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    weights = distill_losses(DistillConfig(losses={"direction": 0.5, "relative": 2.0}, magnitude_weight=0.25))
    terms = stream_terms(weights, "text", student, teacher, None, own)
    assert list(terms) == ["text", "text_relative", "text_magnitude"]
    assert torch.equal(terms["text"], 0.5 * direction_loss(student, teacher))
    assert torch.equal(terms["text_relative"], 2.0 * relative_error(student, teacher))
    assert torch.equal(terms["text_magnitude"], 0.25 * magnitude_loss(student, teacher))


def test_a_term_that_is_only_logged_is_not_descended_whatever_it_is_called():
    found = with_loss({"image": torch.tensor(2.0), "text_ratio": torch.tensor(3.0)}, {"distance": torch.tensor(50.0)})
    assert found["loss"] == 5.0
    assert found["distance"] == 50.0


def test_a_loss_without_weight_is_left_out():
    assert stream_terms({"direction": 0.0}, "image", torch.ones(1, 1, 1), torch.ones(1, 1, 1), None, own) == {}
