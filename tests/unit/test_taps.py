import itertools

import pytest
import torch

from ppcl.taps import observe


def hook_count(transformer):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in transformer.modules())


@pytest.fixture
def transformer(make_transformer):
    return make_transformer(4)


@torch.no_grad()
def test_each_block_gets_what_the_one_before_it_returned(family, transformer, make_batch):
    batch, calls = make_batch(), []
    output = observe(family, transformer, batch.inputs, calls.append)
    assert [call.key for call in calls] == [("transformer_blocks", index) for index in range(4)]
    for before, after in itertools.pairwise(calls):
        for stream in ("image", "text"):
            assert torch.equal(after.inputs[stream], before.outputs[stream])
    assert calls[0].inputs["image"].shape == (2, 16, 64)
    assert calls[0].inputs["text"].shape == (2, 9, 64)
    assert torch.equal(output, transformer(**batch.inputs)[0])


@torch.no_grad()
def test_a_block_called_with_the_recorded_arguments_answers_alike(family, transformer, make_batch):
    """This is what distillation relies on: `kwargs` are the whole input of a block."""

    def check(call):
        again = family.streams_out(call.stack, transformer.transformer_blocks[call.index].forward(**call.kwargs))
        for stream, features in call.outputs.items():
            assert torch.equal(again[stream], features)

    observe(family, transformer, make_batch().inputs, check)


@torch.no_grad()
def test_streams_are_not_swapped(family, transformer, make_batch):
    """A block returns (text, image); the image stream is the one that has the image's tokens."""
    calls = []
    observe(family, transformer, make_batch(text_lengths=(3, 3)).inputs, calls.append)
    for streams in [side for call in calls for side in (call.inputs, call.outputs)]:
        assert {name: tokens.shape[1] for name, tokens in streams.items()} == {"image": 16, "text": 3}


@pytest.mark.parametrize("last", [0, 2, 3])
@torch.no_grad()
def test_the_forward_stops_after_the_last_block_asked_for(family, transformer, make_batch, last):
    ran, seen = [], []
    for index, block in enumerate(transformer.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    tail = []
    transformer.proj_out.register_forward_pre_hook(lambda *_: tail.append(1))
    stopped = observe(
        family, transformer, make_batch().inputs, lambda c: seen.append(c.index), last=("transformer_blocks", last)
    )
    assert stopped is None
    assert ran == seen == list(range(last + 1))
    assert tail == []


@torch.no_grad()
def test_hooks_go_away_however_the_forward_ends(family, transformer, make_batch):
    inputs = make_batch().inputs
    observe(family, transformer, inputs, lambda call: None)
    assert hook_count(transformer) == 0
    observe(family, transformer, inputs, lambda call: None, last=("transformer_blocks", 1))
    assert hook_count(transformer) == 0

    def fail(call):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        observe(family, transformer, inputs, fail)
    assert hook_count(transformer) == 0

    def break_down(*args, **kwargs):
        raise RuntimeError("block broke")

    transformer.transformer_blocks[2].forward = break_down
    with pytest.raises(RuntimeError, match="block broke"):
        observe(family, transformer, inputs, lambda call: None)
    assert hook_count(transformer) == 0
