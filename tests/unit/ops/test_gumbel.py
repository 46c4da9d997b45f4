import torch

from ppcl.ops.gumbel import gumbel_noise, straight_through


def test_choices_are_drawn_as_often_as_softmax_says():
    logits = 100 * torch.tensor([0.02, 0.03, 0.01, 0.0])
    noise = gumbel_noise(40_000, 4, torch.Generator().manual_seed(0))
    drawn = straight_through(logits, noise, tau=0.1)
    assert torch.equal(drawn.sum(dim=1), torch.ones(40_000))
    assert {*drawn.unique().tolist()} == {0.0, 1.0}
    torch.testing.assert_close(drawn.mean(dim=0), logits.softmax(dim=0), atol=0.01, rtol=0)


def test_the_gradient_is_that_of_the_softmax():
    logits = torch.tensor([0.3, -0.1, 0.2], requires_grad=True)
    noise, weights = gumbel_noise(5, 3, torch.Generator().manual_seed(1)), torch.randn(5, 3)
    (gradient,) = torch.autograd.grad((weights * straight_through(logits, noise, 0.7)).sum(), logits)
    (expected,) = torch.autograd.grad((weights * ((logits + noise) / 0.7).softmax(dim=1)).sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_the_same_generator_draws_the_same_noise():
    first, second = (gumbel_noise(3, 2, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)
