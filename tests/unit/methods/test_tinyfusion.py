"""Gates that learn which blocks of a real transformer matter least."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from trainers import train as fit

from ppcl.config import MethodConfig
from ppcl.distill.gates import LearnGates
from ppcl.errors import UsageError
from ppcl.methods.base import Teacher
from ppcl.methods.registry import load_method

BLOCKS = "transformer_blocks"
WEAK = [1, 3, 4, 6]  # two of the blocks 0 to 3, and two of 4 to 7


@pytest.fixture
def make_teacher(family, make_transformer, make_batch):
    """`make_teacher(seed)`: a Qwen-Image transformer in which the `WEAK` of 8 blocks change their streams little."""

    def make(seed=0):
        transformer = make_transformer(8, seed)
        with torch.no_grad():
            for index in WEAK:
                block = transformer.transformer_blocks[index]
                for end in (block.attn.to_out[0], block.attn.to_add_out, block.img_mlp.net[2], block.txt_mlp.net[2]):
                    end.weight *= 0.2
                    end.bias *= 0.2

        def train(module, steps, batch_size):
            fit(module, make_batch, (5, 9, 7, 6), steps)

        return Teacher(family, transformer, lambda: [], lambda: None, train=train)

    return make


def learned(**settings):
    found = {"groups": "2:4", "loss": "output", "weights": "none", "steps": 40, "lr": 1e-3, **settings}
    return load_method(MethodConfig(rule="tinyfusion", settings={"gradient_checkpointing": False, **found}))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_blocks_that_matter_least_are_found(make_teacher, seed):
    teacher = make_teacher(seed)
    found = learned(seed=seed).detect(teacher)
    removed = [index for u, v in found.intervals[BLOCKS] for index in range(u + 1, v + 1)]
    assert removed == WEAK
    assert all(value > 0.5 for value in found.scores["confidence"].values())
    kept = found.scores["keep_probability"]
    assert {name for name, value in kept.items() if value < 0.5} == {f"{BLOCKS}.{index}" for index in WEAK}


@pytest.mark.parametrize("weights", ["lora", "full", "none"])
def test_the_teacher_is_as_before(make_teacher, weights):
    teacher = make_teacher()
    before = {name: value.clone() for name, value in teacher.transformer.state_dict().items()}
    flags = [parameter.requires_grad for parameter in teacher.transformer.parameters()]
    learned(weights=weights, loss="task", steps=3).detect(teacher)
    after = teacher.transformer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [parameter.requires_grad for parameter in teacher.transformer.parameters()] == flags


def test_the_teacher_is_as_before_after_an_exception(make_teacher, make_batch):
    teacher = make_teacher()
    before = {name: value.clone() for name, value in teacher.transformer.state_dict().items()}

    def broken(step, lengths):
        batch = make_batch(step, lengths)
        batch.target.fill_(torch.nan if step else 0)
        return batch

    teacher.train = lambda module, steps, batch_size: fit(module, broken, (5, 9), steps)
    with pytest.raises(UsageError, match=r"method\.settings\.lr=0\.001 made the loss nan at step 1; lower it"):
        learned(loss="task", weights="lora").detect(teacher)
    after = teacher.transformer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(block._forward_hooks for block in teacher.transformer.transformer_blocks)


def test_checkpointed_blocks_run_again_with_their_gates(make_teacher):
    found = [
        learned(gradient_checkpointing=checkpointed, weights="lora", steps=5).detect(make_teacher()).decisions
        for checkpointed in (False, True)
    ]
    for name, group in found[0].groups.items():
        torch.testing.assert_close(group.probabilities, found[1].groups[name].probabilities)


def test_decisions_are_recorded_from_the_start_to_the_end(make_teacher):
    found = learned(steps=4, lr=1e-6).detect(make_teacher()).decisions
    first = found.groups[f"{BLOCKS}.0-3"]
    assert found.steps == [0, 1, 2, 3, 4]
    assert first.probabilities[0] == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    assert first.confidence[0] == pytest.approx(1 / 3)
    assert len(first.probabilities) == len(first.confidence) == 5
    assert all(sum(each) == pytest.approx(2) for each in first.probabilities)


def test_long_trainings_record_a_hundred_steps(make_teacher, family):
    method = learned(steps=250)
    groups = method.groups(family, {BLOCKS: 8}, nn.Identity)
    module = LearnGates(family, make_teacher().transformer, groups, method.settings)
    assert module.recorded[:3] == [0, 2, 5]
    assert module.recorded[-1] == 250
    assert len(module.recorded) == 101
    assert [module.tau(step) for step in (0, 249)] == pytest.approx([4, 0.1])


def test_rows_of_a_batch_that_ranks_share_draw_what_one_rank_would(make_teacher, make_batch, family, monkeypatch):
    method = learned()
    groups = method.groups(family, {BLOCKS: 8}, nn.Identity)
    module = LearnGates(family, make_teacher().transformer, groups, method.settings)
    whole, half = make_batch(0, (5, 9, 7, 6)), replace(make_batch(0, (5, 9)), divided=True)
    alone, parts = module.gates(whole, 7), []
    for number in range(2):
        monkeypatch.setattr("ppcl.distill.gates.share", lambda number=number: (number, 2))
        parts.append(module.gates(half, 7))
    for key, gates in alone.items():
        torch.testing.assert_close(torch.cat([part[key] for part in parts]), gates)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weights": "some"}, r"^method\.settings\.weights=some is not one of lora, full, none\."),
        ({"steps": 0}, r"^method\.settings\.steps=0 must be at least 1\."),
        ({"lr": -1.0}, r"^method\.settings\.lr=-1 must be above 0"),
        ({"tau_end": 0}, r"^method\.settings\.tau_end=0 must be above 0"),
    ],
)
def test_settings_without_sense_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        learned(**settings)
