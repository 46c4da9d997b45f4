import gc
import itertools

import pytest
import torch
from greenlet import getcurrent, greenlet

from ppcl import taps
from ppcl.efficiency import LiveBytes
from ppcl.errors import UsageError
from ppcl.taps import observe, observe_abreast


def hook_count(transformer):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in transformer.modules())


@pytest.fixture
def transformer(make_transformer):
    return make_transformer(4)


@torch.no_grad()
def test_each_block_gets_what_the_one_before_it_returned(family, transformer, make_batch):
    batch, calls = make_batch(), []
    (output,) = observe(family, transformer, batch.inputs, calls.append)
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
        again = family.streams_out(call.stack, transformer.transformer_blocks[call.index].forward(**call.kwargs), {})
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


# Several inputs abreast


def strands():
    """Forwards that rest somewhere."""
    return [found for found in gc.get_objects() if type(found) is greenlet and found and found is not getcurrent()]


def abreast(family, transformer, batches, **kwargs):
    return observe_abreast(family, transformer, [batch.inputs for batch in batches], **kwargs)


@torch.no_grad()
def test_abreast_every_block_sees_all_inputs_before_the_next_one(family, transformer, make_batch):
    batches = [make_batch(seed, text_lengths=lengths) for seed, lengths in enumerate([(3, 9), (5, 5), (8, 2)])]
    expected = [[] for _ in batches]
    for batch, calls in zip(batches, expected, strict=True):
        observe(family, transformer, batch.inputs, calls.append)
    order = []
    for number, call in abreast(family, transformer, batches):
        order.append((call.index, number))
        for stream in ("image", "text"):
            assert torch.equal(call.outputs[stream], expected[number][call.index].outputs[stream])
            assert torch.equal(call.inputs[stream], expected[number][call.index].inputs[stream])
    assert order == [(index, number) for index in range(4) for number in range(3)]
    assert hook_count(transformer) == 0
    assert not strands()


@torch.no_grad()
def test_abreast_ends_after_the_last_block_asked_for_or_when_nobody_asks_on(family, transformer, make_batch):
    batches = [make_batch(0), make_batch(1)]
    ran = []
    handle = transformer.transformer_blocks[2].register_forward_pre_hook(lambda *_: ran.append(1))
    last = ("transformer_blocks", 1)
    assert [call.index for _, call in abreast(family, transformer, batches, last=last)] == [0, 0, 1, 1]
    calls = abreast(family, transformer, batches)
    next(calls)
    calls.close()
    handle.remove()
    assert not ran
    assert hook_count(transformer) == 0
    assert not strands()


def test_abreast_an_error_inside_is_the_callers(family, transformer, make_batch):
    good, bad = make_batch(0), make_batch(1)
    bad.inputs["hidden_states"] = bad.inputs["hidden_states"][..., :3]
    with pytest.raises(RuntimeError, match="shapes"):
        list(abreast(family, transformer, [good, bad]))
    assert hook_count(transformer) == 0
    assert not strands()


@torch.no_grad()
def test_abreast_an_input_that_waits_holds_its_streams_once(family, transformer, make_batch):
    """Not also those that its last block got."""

    def peak(count):
        batches = [make_batch(seed, size=(16, 16)) for seed in range(count)]
        with LiveBytes() as recorder:
            for _, call in abreast(family, transformer, batches):
                streams = sum(stream.nbytes for stream in call.outputs.values())
        return recorder.peak / streams

    assert 1 <= (peak(8) - peak(2)) / 6 < 1.5


@torch.no_grad()
def test_abreast_what_does_not_fit_is_said_after_one_block(family, transformer, make_batch, monkeypatch):
    batches = [make_batch(seed) for seed in range(3)]
    _, call = next(abreast(family, transformer, batches))
    streams = sum(stream.nbytes for stream in call.outputs.values())
    needed = (2 + taps._INSIDE_BLOCK) * streams
    monkeypatch.setattr(taps, "free_bytes", lambda device: needed - 1)
    with pytest.raises(UsageError, match=r"3 batches of 2 samples need .* GB .* free on cpu: lower probe.num_batches"):
        next(abreast(family, transformer, batches, size_keys="probe.num_batches"))
    assert hook_count(transformer) == 0
    assert not strands()
    assert len(list(abreast(family, transformer, batches[:1]))) == 4
    monkeypatch.setattr(taps, "free_bytes", lambda device: needed)
    assert len(list(abreast(family, transformer, batches))) == 12


def test_free_memory_is_what_this_machine_says():
    assert 1e6 < taps.free_bytes(torch.device("cpu")) < 1e15
    assert taps.free_bytes(torch.device("meta")) == float("inf")


def test_abreast_gradients_are_the_callers(family, transformer, make_batch):
    _, call = next(abreast(family, transformer, [make_batch()]))
    assert call.outputs["image"].requires_grad
    with torch.no_grad():
        _, call = next(abreast(family, transformer, [make_batch()]))
    assert not call.outputs["image"].requires_grad


@torch.no_grad()
def test_arguments_without_a_name_do_not_hinder_a_repeated_call(make_linear_teacher):
    """Blocks that take `*args` and `**kwargs` beside what they read, as HunyuanVideo's do."""

    class Wide(torch.nn.Module):
        def forward(self, hidden_states, scale=1, *args, **kwargs):
            return hidden_states * scale + kwargs.get("shift", 0)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([Wide()])

        def forward(self, hidden_states):
            return (self.blocks[0](hidden_states, 2, None, 16, shift=1),)

    family, _, _ = make_linear_teacher([0.1])
    model, x, calls = Model(), torch.ones(1, 2, 2), []
    observe(family, model, {"hidden_states": x}, calls.append)
    assert calls[0].kwargs == {"hidden_states": x, "scale": 2, "shift": 1}
    assert torch.equal(model.blocks[0](**calls[0].kwargs), calls[0].outputs["image"])
