"""A model that is the teacher at high noise levels: which of the two runs, and what is in memory."""

from __future__ import annotations

import pytest
import torch

from ppcl.errors import UsageError
from ppcl.export.quantized import weight_bytes
from ppcl.families.registry import get_family
from ppcl.surgery.noise_levels import ByNoiseLevel
from ppcl.surgery.plugboard import Plugboard

NAME = "transformer_blocks.1-3"


@pytest.fixture
def model(family, make_transformer):
    """A teacher of five blocks, and a pruned model that shares all of them but one, a student."""
    transformer = make_transformer(5)
    student = make_transformer(1, seed=9).transformer_blocks[0]
    board = Plugboard(family, transformer, {"transformer_blocks": [(1, 3)]}, {NAME: student})
    pruned = board(NAME).standalone()
    board()
    return ByNoiseLevel(family, transformer, pruned, 0.7)


@torch.no_grad()
def test_the_noise_level_decides_which_model_runs(model, make_batch):
    inputs = make_batch().inputs
    outputs = [each(**inputs | {"timestep": torch.full((2,), 0.5)})[0] for each in model.models]
    assert not torch.equal(*outputs)
    for sigma, expected in ((0.0, model.pruned), (0.7, model.pruned), (0.71, model.teacher), (1.0, model.teacher)):
        inputs["timestep"] = torch.full((2,), sigma)
        assert torch.equal(model(**inputs)[0], expected(**inputs)[0])
    assert model.calls == {"teacher": 2, "pruned": 2}
    assert model.teacher_share == 0.5


@torch.no_grad()
def test_levels_that_no_one_model_serves_are_refused(model, make_batch):
    inputs = make_batch().inputs
    for levels, words in (((0.5, 0.9), "both sides of 0.7"), ((981.0, 981.0), "noise level of 981")):
        with pytest.raises(UsageError, match=words):
            model(**inputs | {"timestep": torch.tensor(levels)})


def test_what_both_models_share_is_in_memory_once(model):
    teacher, student = model.teacher.num_parameters(), model.pruned.transformer_blocks[1]
    added = sum(parameter.numel() for parameter in student.parameters())
    assert model.num_parameters() == teacher + added == sum(parameter.numel() for parameter in model.parameters())
    assert weight_bytes(model) == 4 * (teacher + added)
    assert model.config.num_layers == 5
    assert model.pruned.config.num_layers == 3


def test_no_timestep_of_a_dit_is_above_1_or_at_0():
    levels = get_family("dit").noise_levels({"timestep": torch.tensor([0, 499, 999])})
    assert levels.tolist() == pytest.approx([0.0005, 0.4995, 0.9995])
