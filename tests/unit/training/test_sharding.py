"""Sharded among one rank, a model computes what it did: what counts is when parameters are whole."""

from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from ppcl.config import DataConfig, SamplingConfig
from ppcl.data.streams import ShapesStream
from ppcl.families.registry import builders, get_family
from ppcl.surgery.share import skeleton
from ppcl.taps import observe
from ppcl.training.sharding import Sharding, assign, whole_call, whole_state

SAMPLING = SamplingConfig(height=32, width=32, max_sequence_length=32)


@pytest.fixture(scope="module")
def sharding():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Sharding(init_device_mesh("cpu", (1,)), torch.device("cpu"), "32-true", cpu_offload=False)
    dist.destroy_process_group()


@pytest.fixture(params=["qwen_image", "qwen_image_edit", "flux", "dit"])
def case(request):
    """A tiny model of each family, and a batch."""
    pipeline = import_module(builders()[f"tiny_{request.param}"]).build_pipeline(0, num_layers=2)
    family = get_family(request.param, pipeline.transformer.config, SAMPLING)
    return family, pipeline.transformer, ShapesStream(family, pipeline, DataConfig(), 3, 2)(0)


def outputs(family, model, batch, last=None):
    """Everything that blocks give, and the velocity."""
    found = {}

    def keep(call):
        found.update({(*call.key, name): value for name, value in call.outputs.items()})

    output = observe(family, model, batch.inputs, keep, last=last)
    return found | {"velocity": output and output[0]}


def test_a_sharded_model_computes_the_same(sharding, case):
    family, model, batch = case
    last = next(iter(family.blocks(model)))
    with torch.no_grad():
        expected = outputs(family, model, batch)
        empty, state = skeleton(model), {key: value.clone() for key, value in model.state_dict().items()}
        sharding.model(family, model)
        for _ in range(2):  # a teacher that was stopped early runs to its end the next time
            assert outputs(family, model, batch, last)["velocity"] is None
            assert all(
                isinstance(parameter, DTensor) for block in model.transformer_blocks for parameter in block.parameters()
            )
            found = outputs(family, model, batch)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert type(empty) is not type(model)  # the class that a config shall name
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(whole_state(model), assign=True)
    assert all(torch.equal(value, state[key]) for key, value in empty.state_dict().items())


def test_parameters_are_copied_from_what_shares_them(sharding):
    first = torch.nn.Linear(3, 5)
    second = torch.nn.Linear(3, 5)
    second.weight = first.weight
    sharding.unit(second, learns=True)
    with torch.no_grad():
        assign(second.weight, torch.ones(5, 3))
        assign(first.bias, torch.zeros(5))
    assert first.weight.ne(1).all()
    assert type(first.weight) is torch.nn.Parameter
    assert whole_state(second)["weight"].eq(1).all()
    assert second.bias.requires_grad


def test_a_part_of_a_block_is_called_with_whole_parameters(sharding):
    def first_layer(module, kwargs):
        return module[0](kwargs["x"])

    block, x = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)), torch.randn(4, 3)
    with torch.no_grad():
        expected = whole_call(block, first_layer, {"x": x})
        sharding.unit(block)
        assert torch.equal(whole_call(block, first_layer, {"x": x}), expected)
        assert isinstance(block[0].weight, DTensor)
