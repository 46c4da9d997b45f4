"""What trained stages share: blocks compiled for the length of a training."""

import pytest
import torch
from torch import nn

from ppcl.training.loop import compiled


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
