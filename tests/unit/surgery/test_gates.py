"""Gates on the blocks of every family's own transformer: 1 is the block, 0 is the model without it."""

from importlib import import_module

import pytest
import torch
from torch import nn

from ppcl.families.registry import builders, get_family
from ppcl.surgery.gates import gated
from ppcl.taps import replace_stack, stack_of

SIZES = {"tiny_dit": (8, 8), "tiny_flux": (4, 4), "tiny_qwen_image": (4, 4), "tiny_qwen_image_edit": (4, 4)}


@pytest.fixture(scope="module", params=SIZES)
def model(request):
    """Family, transformer of 3 blocks a stack (6 single-stream ones), and inputs of two samples."""
    builder = import_module(builders()[request.param])
    pipeline = builder.build_pipeline(0, num_layers=3)
    transformer = pipeline.transformer.eval()
    family = get_family(request.param.removeprefix("tiny_"), dict(transformer.config))
    family.complete(pipeline)
    torch.manual_seed(0)
    for parameter in transformer.parameters():  # some start at zero
        nn.init.normal_(parameter, std=0.1)
    latents, conditions = family.blank(2, SIZES[request.param], 5)
    for value in conditions.values():  # which holds no content yet, but for the sizes of given pictures
        if isinstance(value, torch.Tensor):
            value.normal_() if value.is_floating_point() else value.zero_()
    sigmas = torch.tensor([0.3, 0.8])
    latents = torch.randn_like(latents)
    batch = family.training_batch(latents, conditions, torch.randn_like(latents), sigmas, SIZES[request.param])
    return family, transformer, batch.inputs


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs)[0]


def gates_of(family, transformer, value=1.0):
    return {key: torch.full((2,), value) for key in family.blocks(transformer)}


def test_gates_of_one_change_no_bit(model):
    family, transformer, inputs = model
    with gated(family, transformer, inputs, gates_of(family, transformer)):
        found = run(transformer, inputs)
    assert torch.equal(found, run(transformer, inputs))


def test_a_gate_of_zero_removes_the_block(model):
    family, transformer, inputs = model
    full = run(transformer, inputs)
    for stack in family.stacks:
        blocks = stack_of(transformer, stack)
        gates = gates_of(family, transformer) | {(stack, 1): torch.zeros(2)}
        with gated(family, transformer, inputs, gates):
            found = run(transformer, inputs)
        replace_stack(transformer, stack, nn.ModuleList([block for i, block in enumerate(blocks) if i != 1]))
        shorter = run(transformer, inputs)
        replace_stack(transformer, stack, blocks)
        assert torch.equal(found, shorter)
        assert not torch.equal(found, full)


def test_each_sample_has_a_gate_of_its_own(model):
    family, transformer, inputs = model
    stack = next(iter(family.stacks))
    outputs = []
    for gate in (torch.zeros(2), torch.ones(2), torch.tensor([0.0, 1.0])):
        with gated(family, transformer, inputs, {(stack, 1): gate}):
            outputs.append(run(transformer, inputs))
    torch.testing.assert_close(outputs[2][0], outputs[0][0])
    torch.testing.assert_close(outputs[2][1], outputs[1][1])


def test_gates_are_gone_after_an_exception(model):
    family, transformer, inputs = model
    full = run(transformer, inputs)
    gates = gates_of(family, transformer, 0.0)
    with pytest.raises(RuntimeError, match="stop"), gated(family, transformer, inputs, gates):
        raise RuntimeError("stop")
    assert not any(block._forward_hooks for block in family.blocks(transformer).values())
    assert torch.equal(run(transformer, inputs), full)


class Joined(nn.Module):
    """A block whose two streams are one tensor, as those of Z-Image."""

    def forward(self, x):
        return 2 * x


def test_streams_that_are_joined_in_one_tensor_are_mixed_whole():
    class Family:
        stacks = {"blocks": "n"}

        def blocks(self, transformer):
            return {("blocks", 0): transformer}

        def streams_in(self, stack, kwargs, inputs):
            return {"image": kwargs["x"][:, :2], "text": kwargs["x"][:, 2:]}

        def streams_out(self, stack, output, inputs):
            return {"image": output[:, :2], "text": output[:, 2:]}

    block, x = Joined(), torch.randn(2, 5, 3)
    with gated(Family(), block, {}, {("blocks", 0): torch.tensor([1.0, 0.25])}):
        found = block(x)
    torch.testing.assert_close(found, torch.stack([2 * x[0], 1.25 * x[1]]))
