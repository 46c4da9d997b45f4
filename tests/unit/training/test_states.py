"""Optimiser states in fewer bits: how near they are, how large, and that nothing is lost on the way through a file."""

import io

import pytest
import torch
from torch import nn

from ppcl.config import TrainingConfig
from ppcl.training.checkpoints import checkpoint_bytes
from ppcl.training.optimizers import adamw, muon
from ppcl.training.states import decode, encode

SHAPES = [(64, 64), (96, 128), (64,), (7, 11)]  # the last two are too small for codes


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("squares", [False, True])
def test_codes_are_near_whatever_the_size(squares):
    """Within 3% of values of at least a tenth of the largest in their block, and within 30% of a thousandth."""
    size = torch.logspace(0, -3, 256) * torch.logspace(-12, 6, 16).unsqueeze(1)
    values = size * torch.sign(drawn(16, 256)) if not squares else size
    found = decode(*encode(values.clone(), squares=squares))
    off = ((found - values) / values).abs()
    assert off[:, size[0] >= 0.1 * size[0, 0]].max() < 0.03
    assert off.max() < (0.1 if squares else 0.3)
    torch.testing.assert_close(found[:, 0], values[:, 0], rtol=1e-6, atol=0)  # the largest is exact


def test_codes_of_nothing_are_nothing_and_no_mean_of_squares_vanishes():
    for squares in (False, True):
        assert not decode(*encode(torch.zeros(2, 256), squares=squares)).any()
    values = torch.cat([torch.ones(1), torch.full((255,), 1e-20)])
    assert decode(*encode(values, squares=True)).min() > 0
    assert decode(*encode(values.fill_(1e-30), squares=True)).min() > 0


def made(kind, states):
    """An optimiser of equal weights, each in a group with a rate of its own."""
    matrices = SHAPES[:2] + SHAPES[3:]
    weights = [nn.Parameter(drawn(*shape)) for shape in (SHAPES if kind == "adamw" else matrices)]
    groups = [{"params": [weight], "lr": 0.01 * (n + 1)} for n, weight in enumerate(weights)]
    if kind == "adamw":
        return weights, adamw(groups, TrainingConfig(lr=None, optimizer_states=states))
    return weights, muon(groups, 0.0, 0.02, states)


def steps(weights, optimizer, first, last, each=lambda: None):
    for step in range(first, last):
        for number, weight in enumerate(weights):
            # One weight waits, as the students whose gradients are not there yet.
            weight.grad = None if number == step % 3 else drawn(*weight.shape, seed=100 * step + number)
        optimizer.step()
        each()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("states", ["bfloat16", "8bit"])
def test_a_step_is_that_of_a_plain_optimizer_whose_states_are_rounded(kind, states):
    (weights, packed), (expected, plain) = made(kind, states), made(kind, "float32")

    def rounded():
        for state in plain.state.values():
            for key, value in state.items():
                if key != "step" and states == "bfloat16":
                    value.copy_(value.bfloat16())
                elif key != "step" and value.numel() >= 4096:
                    value.copy_(decode(*encode(value.clone(), squares=key == "exp_avg_sq")))

    steps(weights, packed, 0, 6)
    steps(expected, plain, 0, 6, rounded)
    for one, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    size = checkpoint_bytes(nn.ParameterList(weights), [packed]) - sum(weight.nbytes for weight in weights)
    held = sum(value.nbytes for state in packed.state.values() for key, value in state.items() if key != "step")
    assert held == size


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("states", ["bfloat16", "8bit"])
def test_states_that_were_saved_go_on_to_the_same_bits(kind, states):
    weights, optimizer = made(kind, states)
    steps(weights, optimizer, 0, 4)
    file = io.BytesIO()
    torch.save({"weights": weights, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others, other = made(kind, states)
    for weight, value in zip(others, saved["weights"], strict=True):
        weight.data.copy_(value)
    other.load_state_dict(saved["optimizer"])
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert {key: value.dtype for key, value in one.items()} == {key: value.dtype for key, value in two.items()}
    steps(weights, optimizer, 4, 8)
    steps(others, other, 4, 8)
    for one, two in zip(weights, others, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
