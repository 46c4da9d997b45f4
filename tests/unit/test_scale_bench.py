"""`make bench` compares like with like: the published loop, made anew, computes what our step computes."""

import pytest
import torch
from trainers import train

from experiments.scale import real_block
from experiments.scale.models import STACK, TINY, TINY_INTERVALS, make_batch, make_teacher
from experiments.scale.published import PublishedDistillation
from experiments.scale.steps import block_passes, losses
from ppcl.config import DistillConfig
from ppcl.distill.depth import DepthDistillation

PAIRS = {STACK: TINY_INTERVALS}


@pytest.fixture(scope="module")
def teacher():
    return make_teacher(TINY)


def modules(family, teacher, **settings):
    return [
        kind(family, teacher, PAIRS, DistillConfig(**settings)) for kind in (DepthDistillation, PublishedDistillation)
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_published_loop_has_our_losses(family, teacher, checkpointing):
    ours, published = modules(family, teacher, gradient_checkpointing=checkpointing)
    expected = losses(ours, make_batch(TINY))
    assert len(expected) == len(TINY_INTERVALS)
    assert min(expected) > 1e-4  # or equality would say nothing
    assert losses(published, make_batch(TINY)) == pytest.approx(expected, rel=0, abs=1e-6)


def test_padding_is_left_out_of_both(family, make_transformer, make_batch):
    ours, published = modules(family, make_transformer(TINY.num_layers))
    batch = make_batch(0, (5, 9, 7))
    assert losses(published, batch) == pytest.approx(losses(ours, batch), rel=0, abs=1e-6)


def test_both_train_to_the_same_weights(family, make_transformer, make_batch):
    settings = {"steps": 3, "lr": 1e-3, "warmup_steps": 1}
    found = [train(module, make_batch, (5, 9)) for module in modules(family, make_transformer(9), **settings)]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-5)


def passes(module, teacher, batch):
    """Calls of blocks in a step; one that needs a gradient has a backward that counts two."""
    count = 0

    def add(block, args, kwargs):  # before it: a checkpointed block's second forward ends with its last operation
        nonlocal count
        count += 1

    blocks = [*getattr(teacher, STACK), *module.parts.values()]
    handles = [block.register_forward_pre_hook(add, with_kwargs=True) for block in blocks]
    losses(module, batch)
    for handle in handles:
        handle.remove()
    return count + 2 * len(module.parts)


def test_the_published_loop_costs_what_is_said(family, teacher):
    """The chain goes unused, and the pass ends with the last interval."""
    expected = block_passes(TINY_INTERVALS)
    batch = make_batch(TINY)
    ours, published = modules(family, teacher)
    assert passes(published, teacher, batch) == expected["published"]
    assert passes(ours, teacher, batch) == expected["ours"]
    ours, _ = modules(family, teacher, gradient_checkpointing=False)
    assert passes(ours, teacher, batch) == expected["ours, no checkpointing"]


@pytest.mark.parametrize("part", ["probe", "finetune", "depth", "width"])
def test_the_plan_holds_with_data(part):
    """A narrow run of what `real_block` measures at the real size."""
    for name, row in real_block.compare(part, 128, real_block.TINY).items():
        assert row["ratio"] == pytest.approx(1, rel=0.15), name
