"""A step whose samples come in several smaller batches is the step of the whole batch."""

import copy

import pytest
import torch
from trainers import train

from ppcl.config import DataConfig, DistillConfig, FinetuneConfig
from ppcl.data.streams import ShapesStream
from ppcl.distill.depth import DepthDistillation
from ppcl.distill.finetune import FineTune
from ppcl.distill.width import WidthDistillation, places
from ppcl.layers import Layout

SETTINGS = {"steps": 3, "lr": 1e-3, "warmup_steps": 1, "gradient_checkpointing": False, "max_grad_norm": 1.0}
STACK = "transformer_blocks"


@pytest.fixture(scope="module")
def stream(family, pipeline):
    return ShapesStream(family, pipeline, DataConfig(), seed=4, batch_size=8)


def depth(family, teacher, mode="parallel"):
    return DepthDistillation(family, teacher, {STACK: [(0, 1), (2, 3)]}, DistillConfig(**SETTINGS, mode=mode))


def width(family, teacher):
    sets = {STACK: {"text": [2], "ffn": [1]}}
    kept = places(family, teacher, {}, {})
    return WidthDistillation(family, teacher, kept, sets, Layout(), DistillConfig(**SETTINGS))


def finetune(family, teacher, **settings):
    student = copy.deepcopy(teacher)
    del student.transformer_blocks[1]
    return FineTune(family, teacher, student, FinetuneConfig(**SETTINGS, **settings), {(STACK, 1): (STACK, 2)})


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        (depth, 1e-4),
        (lambda *args: depth(*args, mode="sequential"), 1e-4),
        (width, 0.1),  # Eq. 12 is relative to the size of a batch's features
        (finetune, 1e-4),
        (lambda *args: finetune(*args, feature_weight=1.0), 0.1),  # and so is the distance of features
    ],
)
def test_a_divided_step_is_the_whole_step(family, make_transformer, stream, make, tolerance):
    """Gradients are compared and not weights: AdamW's first steps have the sign of a gradient, however small it is."""
    gradients = {}
    for parts in (1, 2, 4):
        module, found = make(family, make_transformer(4)), []
        module.prepare_gradients = lambda parameters, _, found=found: found.extend(
            p.grad.clone() for p in parameters if p.grad is not None
        )
        train(module, lambda step, _, parts=parts: stream.divided(step, parts), (), steps=1)
        gradients[parts] = found
    assert gradients[1]
    for parts in (2, 4):
        for value, whole in zip(gradients[parts], gradients[1], strict=True):
            assert (value - whole).norm() <= tolerance * whole.norm()


def test_held_out_losses_do_not_depend_on_the_division(family, make_transformer, stream):
    module = depth(family, make_transformer(4))
    whole, divided = (module.heldout(stream.divided(7, parts)) for parts in (1, 4))
    for one, other in zip(whole, divided, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_the_parts_of_a_batch_are_its_rows(stream):
    whole, parts = stream(3), stream.divided(3, 4)
    for key in ("hidden_states", "encoder_hidden_states", "timestep"):
        assert torch.equal(torch.cat([part.inputs[key] for part in parts]), whole.inputs[key])
    assert torch.equal(torch.cat([part.target for part in parts]), whole.target)
