"""What trained stages share: blocks compiled for the length of a training, and which parameters are Muon's."""

from importlib import import_module

import pytest
import torch
from torch import nn

from ppcl.families.registry import builders, get_family
from ppcl.training.loop import compiled
from ppcl.training.optimizers import split_for_muon


@pytest.fixture
def block():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


def test_compiled_blocks_compute_the_same_and_are_eager_again(block):
    x = torch.randn(3, 8)
    expected, keys = block(x), list(block.state_dict())
    with compiled([block]):
        assert "forward" in vars(block)
        found = block(x)
        assert list(block.state_dict()) == keys
    torch.testing.assert_close(found, expected)
    assert "forward" not in vars(block)


def test_taps_on_compiled_blocks_come_and_go(block):
    """Each hook sees its own call: none is compiled in."""
    x, seen = torch.randn(3, 8), []
    with compiled([block]):
        for name in ("first", "second"):
            handle = block.register_forward_hook(lambda module, args, output, name=name: seen.append(name))
            block(x)
            handle.remove()
        block(x)
    assert seen == ["first", "second"]


def test_a_forward_of_its_own_comes_back_even_after_an_error(block):
    eager = block.forward
    block.forward = own = lambda x: eager(2 * x)  # as offloading hooks do
    with pytest.raises(ZeroDivisionError), compiled([block]):
        1 / (block.forward is own)
    assert block.forward is own


@pytest.mark.parametrize("builder", ["tiny_qwen_image", "tiny_flux", "tiny_dit"])
def test_muon_takes_the_matrices_of_attention_and_ffns(builder):
    model = import_module(builders()[builder]).build_pipeline(0, 2).transformer
    family = get_family(builder.removeprefix("tiny_"))
    hidden, rest = split_for_muon(family, model.requires_grad_(True), family.blocks(model).values())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert names.keys() == {id(parameter) for parameter in [*hidden, *rest]}
    parts = ("attn", "attn1", "ff", "ff_context", "img_mlp", "txt_mlp", "proj_mlp", "proj_out")
    of_blocks = [names[id(parameter)].split(".") for parameter in hidden]
    assert of_blocks
    assert all(stack.endswith("_blocks") and part in parts for stack, _, part, *_ in of_blocks)
    left = [names[id(parameter)] for parameter in rest if parameter.ndim == 2 and "_blocks." in names[id(parameter)]]
    assert all("norm" in name or "_mod." in name for name in left)
