"""What trained stages share: blocks compiled for the length of a training."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

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


def test_a_few_graphs_serve_all_aspects_and_text_lengths(make_transformer, make_batch, monkeypatch):
    """One without gradients and one with them, each with and without padded text."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traces, and generates no code
    torch._dynamo.reset()
    counters.clear()
    model, counts = make_transformer(3), []
    with compiled(model.transformer_blocks), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for size in [(4, 5), (5, 4), (3, 7), (7, 3), (2, 10), (10, 2), (6, 3), (3, 6), (5, 5), (4, 6)]:
            for lengths in [(sum(size), 3 * size[0]), (size[1] + 2,) * 2]:
                inputs = make_batch(sum(size), lengths, size).inputs
                with torch.no_grad():
                    found = model(**inputs)[0]
                with torch.autocast("cpu", torch.bfloat16):
                    model(**inputs)[0].sum().backward()
            counts.append(counters["stats"]["unique_graphs"])
    assert counts == [4] * 10
    torch.testing.assert_close(found, model(**inputs)[0])
