"""A teacher in bfloat16: what learns beside it is held in float32, and the teacher computes as it always does."""

import copy

import pytest
import torch
from trainers import train

from ppcl.config import DistillConfig, FinetuneConfig
from ppcl.data.batches import TrainingBatch
from ppcl.distill.depth import DepthDistillation
from ppcl.distill.finetune import FineTune
from ppcl.distill.width import WidthDistillation, places
from ppcl.errors import UsageError
from ppcl.layers import Layout
from ppcl.precision import fast_products, same_bits

STACK = "transformer_blocks"
PAIRS = {STACK: [(0, 1), (2, 4)]}
WIDTH = {STACK: {"text": [3], "ffn": [2]}}
LENGTHS = (5, 9)
MIXED = "bf16-mixed"


@pytest.mark.parametrize(("device", "wanted", "within"), [("cuda", True, "high"), ("cuda", False, "highest"),
                                                          ("cpu", True, "highest")])  # fmt: skip
def test_float32_products_are_fast_for_a_training_on_a_gpu_alone(device, wanted, within):
    with fast_products(torch.device(device), wanted=wanted):
        assert torch.get_float32_matmul_precision() == within
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("device", "wanted"), [("cuda", True), ("cuda", False), ("cpu", True)])
def test_sums_have_a_fixed_order_on_a_gpu_if_wanted(device, wanted):
    with same_bits(torch.device(device), wanted=wanted):
        assert torch.are_deterministic_algorithms_enabled() == (device == "cuda" and wanted)
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_has_no_fixed_order_is_named():
    with pytest.raises(UsageError, match=r"trainer\.deterministic=true: .* in put_ .*: drop it"):  # noqa: SIM117
        with same_bits(torch.device("cuda"), wanted=True):
            raise RuntimeError("put_ with accumulate=False does not have a deterministic implementation, but you set..")
    assert not torch.are_deterministic_algorithms_enabled()


def settings(kind=DistillConfig, **changes):
    return kind(**({"steps": 8, "lr": 1e-5, "warmup_steps": 1, "gradient_checkpointing": False} | changes))


@pytest.fixture
def teacher(make_transformer):
    return make_transformer(6).to(torch.bfloat16)


def halved(value):
    return value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value


@pytest.fixture
def make_half_batch(make_batch):
    """As `make_batch`, of what encoders in bfloat16 give."""

    def make(*arguments, **options):
        batch = make_batch(*arguments, **options)
        halves = {name: halved(value) for name, value in batch.inputs.items()}
        return TrainingBatch(halves, halved(batch.target), halved(batch.sigmas))

    return make


def depth(family, teacher, **changes):
    return DepthDistillation(family, teacher, PAIRS, settings(**changes), MIXED)


def width(family, teacher, **changes):
    kept = places(family, teacher, {}, {})
    return WidthDistillation(family, teacher, kept, WIDTH, Layout(), settings(**changes), precision=MIXED)


def tuned(family, teacher, **changes):
    """A copy of the teacher has nothing to learn from it, but from the data."""
    config = settings(FinetuneConfig, flow_weight=1.0, **changes)
    return FineTune(family, teacher, copy.deepcopy(teacher), config, precision=MIXED)


def learning(module):
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("make", [depth, width, tuned])
def test_steps_too_small_for_bfloat16_are_taken(family, teacher, make_half_batch, make):
    """A step of 1e-5 would leave nine tenths of a block's weights as they are."""
    module = make(family, teacher)
    before = {name: parameter.detach().clone() for name, parameter in learning(module).items()}
    assert {value.dtype for value in before.values()} == {torch.float32}
    train(module, make_half_batch, LENGTHS, steps=3)
    after = {name: parameter.detach() for name, parameter in learning(module).items()}
    # Some get no gradient: the text of the last block, for one.
    learned = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert len(learned) > 0.8 * len(after)
    moved = torch.cat([(after[name] != before[name]).flatten() for name in learned])
    assert moved.float().mean() > 0.95
    if make is not width:  # projectors begin at zero, where bfloat16 is fine enough
        lost = torch.cat([(after[name].bfloat16() == before[name].bfloat16()).flatten() for name in learned])
        assert lost.float().mean() > 0.5


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_students_learn_as_of_a_float32_teacher(family, make_transformer, make_batch, make_half_batch, mode):
    changes = {"lr": 1e-3, "mode": mode, "steps": 20}
    whole = DepthDistillation(family, make_transformer(6), PAIRS, settings(**changes))
    half = depth(family, make_transformer(6).to(torch.bfloat16), **changes)
    for module, make in ((whole, make_batch), (half, make_half_batch)):
        train(module, make, LENGTHS, steps=20)
    losses = [
        [terms["loss"] for terms in module.heldout([make(99, LENGTHS)])]
        for module, make in ((whole, make_batch), (half, make_half_batch))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("make", [depth, width, tuned])
def test_only_what_learns_is_under_autocast(family, teacher, make_half_batch, make):
    """So that a teacher beside a training says what it says when boundaries are written."""
    module = make(family, teacher)
    blocks = {"teacher": list(teacher.transformer_blocks)}
    blocks["student"] = {
        depth: lambda: list(module.parts.values()),
        width: lambda: [item.block for item in module.pruned],
        tuned: lambda: list(module.student.transformer_blocks),
    }[make]()
    seen = {"teacher": set(), "student": set()}
    for kind, found in blocks.items():
        for block in found:
            block.register_forward_pre_hook(
                lambda block, args, kind=kind: seen[kind].add(torch.is_autocast_enabled("cpu"))
            )
    train(module, make_half_batch, LENGTHS, steps=1)
    assert seen == {"teacher": {False}, "student": {True}}
    assert all(parameter.dtype == torch.bfloat16 for parameter in teacher.parameters())


@pytest.mark.parametrize("make", [depth, width])
def test_gradient_checkpointing_does_not_change_the_weights(family, teacher, make_half_batch, make):
    plain, checkpointed = (
        train(make(family, teacher, gradient_checkpointing=flag), make_half_batch, LENGTHS) for flag in (False, True)
    )
    assert all(torch.equal(checkpointed[name], value) for name, value in plain.items())


def test_a_lora_learns_in_float32_on_weights_that_stay_as_they_are(family, teacher, make_half_batch):
    module = tuned(family, teacher, lora_rank=2, lr=1e-3)
    frozen = {name: value for name, value in module.student.named_parameters() if not value.requires_grad}
    assert frozen
    assert {value.dtype for value in frozen.values()} == {torch.bfloat16}
    assert {value.dtype for value in learning(module).values()} == {torch.float32}
    train(module, make_half_batch, LENGTHS, steps=2)
    from_zero = [parameter.abs().sum() > 0 for name, parameter in learning(module).items() if "lora_B" in name]
    assert sum(from_zero) > 0.8 * len(from_zero)  # the text of the last block gets no gradient
