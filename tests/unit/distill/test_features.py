"""The feature losses against plain references in numpy, how their weight falls, and what is frozen."""

import copy

import lightning as L
import numpy as np
import pytest
import torch
from trainers import train

from ppcl.config import FinetuneConfig
from ppcl.distill.finetune import FineTune
from ppcl.distill.frozen import before_removal

LENGTHS = (5, 9, 7)
STACK = "transformer_blocks"
STANDS_FOR = {(STACK, 0): (STACK, 0), (STACK, 1): (STACK, 2)}


def settings(**changes):
    return FinetuneConfig(**({"steps": 4, "lr": 1e-3, "warmup_steps": 1, "gradient_checkpointing": False} | changes))


@torch.no_grad()
def run_plainly(model, batch):
    """The velocity, and the image stream after every block, as float64 arrays."""
    streams, handles = [], []
    for block in model.transformer_blocks:
        handles.append(block.register_forward_hook(lambda *call: streams.append(call[-1][1].double().numpy())))
    velocity = model(**batch.inputs)[0].double().numpy()
    for handle in handles:
        handle.remove()
    return velocity, streams


def masked(features, sigmas):
    """`features` [B, tokens, D] with 0 for the extreme values of each sample."""
    found = np.zeros_like(features)
    for row, sample in enumerate(features):
        near = np.abs(sample - sample.mean()) < sigmas * sample.std()
        assert 0 < (~near).sum() < near.sum()  # some are extreme, and not most
        found[row][near] = sample[near]
    return found


@pytest.mark.parametrize("sigmas", [1.5, 2.0])
def test_masked_distillation_equals_a_plain_reference(family, teacher, student, make_batch, sigmas):
    batch = make_batch(0, LENGTHS)
    weights = {"output_weight": 0.9, "flow_weight": 0.1, "feature_weight": 0.01}
    config = settings(**weights, feature_loss="masked", feature_decay=True, mask_sigmas=sigmas)
    terms = FineTune(family, teacher, student, config, STANDS_FOR).losses(batch)
    velocity, mine = run_plainly(student, batch)
    target, its = run_plainly(teacher, batch)
    pairs = [(mine[here[1]], its[there[1]]) for here, there in STANDS_FOR.items()]
    feature = np.mean([np.mean((masked(s, sigmas) - masked(t, sigmas)) ** 2) for s, t in pairs])
    output = np.mean((velocity - target) ** 2)
    flow = np.mean((velocity - batch.target.double().numpy()) ** 2)
    assert terms["feature"].item() == pytest.approx(feature, rel=1e-4)
    assert terms["loss"].item() == pytest.approx(0.9 * output + 0.1 * flow + 0.01 * feature, rel=1e-4)


def test_summed_features_equal_a_plain_reference(family, teacher, student, make_batch):
    batch = make_batch(0, LENGTHS)
    config = settings(feature_loss="summed", feature_weight=1e-4)
    terms = FineTune(family, teacher, student, config, STANDS_FOR).losses(batch)
    (velocity, mine), (target, its) = run_plainly(student, batch), run_plainly(teacher, batch)
    feature = sum(np.mean((mine[here[1]] - its[there[1]]) ** 2) for here, there in STANDS_FOR.items())
    assert terms["feature"].item() == pytest.approx(feature, rel=1e-4)
    assert terms["loss"].item() == pytest.approx(np.mean((velocity - target) ** 2) + 1e-4 * feature, rel=1e-4)


def gradients_of(module, batch):
    module.losses(batch)["loss"].backward()
    return [parameter.grad for parameter in module.student.parameters()]


@pytest.mark.parametrize("kind", ["masked", "summed"])
def test_recomputed_activations_give_the_same_gradients(family, teacher, student, make_batch, kind):
    found = []
    for recomputed in (False, True):
        config = settings(feature_loss=kind, feature_weight=0.5, gradient_checkpointing=recomputed)
        module = FineTune(family, teacher, copy.deepcopy(student), config, STANDS_FOR)
        module.student.train()  # diffusers recomputes only then
        found.append(gradients_of(module, make_batch(0, LENGTHS)))
    assert any(gradient is not None for gradient in found[0])
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


class Weights(L.Callback):
    """The weight of the feature loss before every step."""

    def __init__(self):
        self.found = []

    def on_train_batch_start(self, trainer, module, *_):
        self.found.append(module.feature_weight)


def test_the_weight_falls_linearly_with_the_steps(family, teacher, student, make_batch):
    recorder = Weights()
    config = settings(feature_loss="masked", feature_weight=0.01, feature_decay=True)
    train(FineTune(family, teacher, student, config, STANDS_FOR), make_batch, LENGTHS, 4, [recorder])
    assert recorder.found == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_it_stays_without_decay(family, teacher, student, make_batch):
    recorder = Weights()
    train(
        FineTune(family, teacher, student, settings(feature_weight=0.3), STANDS_FOR), make_batch, LENGTHS, 2, [recorder]
    )
    assert recorder.found == [0.3, 0.3]


@pytest.mark.parametrize(
    ("students", "frozen"),
    [
        ([], {0, 1}),  # block 1 of the interval [1, 2] is the teacher's
        (["transformer_blocks.1-2"], {0}),  # a student has taken its place
    ],
)
def test_what_comes_before_the_first_removed_block(family, make_transformer, students, frozen):
    model = make_transformer(3)
    stands_for = {(STACK, 0): (STACK, 0), (STACK, 1): (STACK, 2), (STACK, 2): (STACK, 3)}
    found = {id(parameter) for parameter in before_removal(family, model, stands_for, students)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in found}
    assert {int(name.split(".")[1]) for name in names if name.startswith(STACK)} == frozen
    outside = {name.split(".")[0] for name, _ in model.named_parameters()} - {STACK}
    assert outside - {name.split(".")[0] for name in names} == {"norm_out", "proj_out"}


def test_a_mean_of_weights_shares_what_is_frozen(family, teacher, student, make_batch):
    frozen = before_removal(family, student, STANDS_FOR, ["transformer_blocks.1-2"])
    before = [parameter.detach().clone() for parameter in frozen]
    module = FineTune(family, teacher, student, settings(ema_decay=0.9), STANDS_FOR, frozen=frozen)
    train(module, make_batch, LENGTHS, 2)
    assert all(map(torch.equal, frozen, before))
    assert {id(each) for each in frozen} <= {id(each) for each in module.ema.parameters()}
