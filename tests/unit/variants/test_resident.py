"""Only the model that draws is on the device. A copy stands for the device here: what is on it has other memory."""

import pytest
import torch
from torch import nn

from ppcl.variants.switch import Resident


@pytest.fixture
def shared():
    """Two models with one layer in common."""
    layers = [nn.Linear(3, 3) for _ in range(3)]
    return nn.Sequential(layers[0], layers[1]), nn.Sequential(layers[1], layers[2])


def memory(*modules):
    return [parameter.data_ptr() for module in modules for parameter in module.parameters()]


def test_a_model_leaves_the_device_for_its_own_memory_when_another_comes(shared):
    first, second = shared
    there = []

    def to_device(tensor):
        if tensor.data_ptr() in {copied.data_ptr() for copied in there}:
            return tensor
        there.append(tensor.clone())
        return there[-1]

    resident, before = Resident(to_device), memory(first, second)
    values = [parameter.clone() for parameter in (*first.parameters(), *second.parameters())]
    resident(first, [first, second])
    assert not {*memory(first)} & {*before}
    common = memory(first[1])
    resident(second, [first, second])
    assert memory(first[0]) == before[:2]
    assert memory(second[0]) == common  # it stays where it is
    assert not {*memory(second)} & {*before}
    resident(first, [first, second])
    assert memory(second[1]) == before[-2:]
    now = (*first.parameters(), *second.parameters())
    assert all(torch.equal(one, other) for one, other in zip(now, values, strict=True))


def test_quantised_weights_go_with_all_that_they_consist_of():
    """torchao's tensor is a wrapper: the integers and the scales that it computes with are tensors of their own."""
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(64, 32, bias=False).requires_grad_(False)
    granularity = quantization.granularity.PerGroup(32)
    quantization.quantize_(layer, quantization.IntxWeightOnlyConfig(getattr(torch, "int4"), granularity))  # noqa: B009
    parts = [*layer.weight.__tensor_flatten__()[0]]
    before = [getattr(layer.weight, part).data_ptr() for part in parts]
    stream = torch.randn(2, 64)
    expected = layer(stream)
    resident, other = Resident(torch.clone), nn.Linear(64, 32)
    resident(layer, [layer, other])
    assert not {*before} & {getattr(layer.weight, part).data_ptr() for part in parts}
    assert torch.equal(layer(stream), expected)
    resident(other, [layer, other])
    assert [getattr(layer.weight, part).data_ptr() for part in parts] == before
    assert torch.equal(layer(stream), expected)
