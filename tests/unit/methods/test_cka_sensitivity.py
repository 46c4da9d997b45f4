import weakref
from dataclasses import replace

import pytest
import torch

from ppcl.config import MethodConfig
from ppcl.errors import UsageError
from ppcl.methods.base import Teacher
from ppcl.methods.cka_sensitivity import CkaSensitivity
from ppcl.methods.registry import load_method
from ppcl.methods.removal import runs_to_intervals
from ppcl.ops.cka import centre, cka


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        ([], []),
        ([4], [(3, 4)]),
        ([6, 4, 5], [(3, 6)]),
        ([1, 2, 8], [(0, 2), (7, 8)]),
        ([2, 4], [(1, 2), (3, 4)]),  # apart by one block: that block stands for the second run
    ],
)
def test_each_run_is_stood_for_by_the_block_before_it(removed, expected):
    assert runs_to_intervals(removed) == expected


def make_identity(block):
    """Shut the output gates of both streams, so that the block adds exactly nothing."""
    for modulation in (block.img_mod[1], block.txt_mod[1]):
        torch.nn.init.zeros_(modulation.weight)
        torch.nn.init.zeros_(modulation.bias)


@pytest.fixture
def teacher(family, make_transformer, make_batch):
    transformer = make_transformer(5)
    make_identity(transformer.transformer_blocks[3])
    return Teacher(family, transformer, lambda: [make_batch(seed) for seed in (0, 1)], lambda: None)


def test_a_block_that_does_nothing_ranks_first(teacher):
    found = CkaSensitivity(MethodConfig(rule="cka_sensitivity", num_remove=1)).detect(teacher)
    assert found.intervals == {"transformer_blocks": [(2, 3)]}
    scores = found.scores["cka_without"]
    assert scores["transformer_blocks.3"] == pytest.approx(1, abs=1e-9)
    assert all(score < 1 - 1e-6 for name, score in scores.items() if name != "transformer_blocks.3")


@torch.no_grad()
def test_scores_equal_a_model_built_without_the_block(teacher, make_transformer):
    found = CkaSensitivity(MethodConfig(rule="cka_sensitivity", num_remove=1)).detect(teacher)
    for index in range(5):
        shorter = make_transformer(4)
        kept = [i for i in range(5) if i != index]
        state = teacher.transformer.state_dict()
        renamed = {k: v for k, v in state.items() if not k.startswith("transformer_blocks.")}
        for new, old in enumerate(kept):
            prefix = f"transformer_blocks.{old}."
            renamed |= {
                f"transformer_blocks.{new}.{k.removeprefix(prefix)}": v
                for k, v in state.items()
                if k.startswith(prefix)
            }
        shorter.load_state_dict(renamed)
        values = [
            cka(centre(teacher.transformer(**batch.inputs)[0]), centre(shorter(**batch.inputs)[0]))
            for batch in teacher.calibration()
        ]
        assert found.scores["cka_without"][f"transformer_blocks.{index}"] == pytest.approx(
            torch.cat(values).mean().item(), abs=1e-9
        )


def test_batches_are_made_one_after_another(teacher, make_batch):
    made = []

    def calibration():
        for seed in range(4):
            assert sum(ref() is not None for ref in made) <= 1  # the one before
            made.append(weakref.ref(batch := make_batch(seed)))
            yield batch
            del batch

    teacher.calibration = calibration
    CkaSensitivity(MethodConfig(rule="cka_sensitivity", num_remove=1)).detect(teacher)
    assert len(made) == 4


@pytest.mark.parametrize("num_remove", [1, 2, 3])
def test_it_removes_as_many_blocks_as_asked_and_never_the_first(teacher, num_remove):
    method = load_method(MethodConfig(rule="cka_sensitivity", num_remove=num_remove))
    pairs = method.detect(teacher).intervals["transformer_blocks"]
    assert sum(v - u for u, v in pairs) == num_remove
    assert all(0 <= u < v <= 4 for u, v in pairs)


def test_first_and_last_bound_the_intervals(teacher):
    """Block 3 scores best, but is out of bounds; block `start` must stay to stand for what follows."""
    method = MethodConfig(rule="cka_sensitivity", num_remove=1, start=1, end=2)
    assert CkaSensitivity(method).detect(teacher).intervals == {"transformer_blocks": [(1, 2)]}


def test_the_block_list_is_put_back(teacher):
    blocks = teacher.transformer.transformer_blocks
    modules = list(blocks)
    CkaSensitivity(MethodConfig(rule="cka_sensitivity", num_remove=1)).detect(teacher)
    assert teacher.transformer.transformer_blocks is blocks
    assert all(now is before for now, before in zip(blocks, modules, strict=True))


def test_the_block_list_is_put_back_when_a_forward_fails(teacher):
    blocks = teacher.transformer.transformer_blocks
    calls = []

    def fail_on_the_second_forward(module, args, kwargs):
        calls.append(len(module.transformer_blocks))
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    teacher.transformer.register_forward_pre_hook(fail_on_the_second_forward, with_kwargs=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        CkaSensitivity(MethodConfig(rule="cka_sensitivity", num_remove=1)).detect(teacher)
    assert calls == [5, 4]
    assert teacher.transformer.transformer_blocks is blocks


def test_the_last_blocks_that_stay_the_teachers_are_not_removed(teacher, monkeypatch):
    monkeypatch.setattr(teacher.family, "facts", replace(teacher.family.facts, last_blocks=2))
    found = CkaSensitivity(MethodConfig(rule="cka_sensitivity", num_remove=2)).detect(teacher)
    assert found.intervals == {"transformer_blocks": [(0, 2)]}


def test_a_similarity_that_is_no_number_chooses_no_block(teacher):
    torch.nn.init.constant_(teacher.transformer.transformer_blocks[1].img_mod[1].bias, torch.nan)
    with pytest.raises(UsageError, match=r"no block is chosen.*transformer_blocks"):
        CkaSensitivity(MethodConfig(rule="cka_sensitivity", num_remove=1)).detect(teacher)
