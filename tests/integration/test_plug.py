"""Plug and play: students switch in a loaded pipeline, and may be trained in any grouping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import INTERVALS, NUM_LAYERS, PLUG_NAMES, assert_same_tensors, modified, plug_tensors, ppcl, succeed
from diffusers import DiffusionPipeline

from ppcl.errors import UsageError
from ppcl.surgery.plugboard import plug

FIRST, SECOND = PLUG_NAMES


def draw(pipeline: Any) -> np.ndarray:
    return pipeline(
        ["a red circle and a blue square"],
        negative_prompt=[""],
        generator=torch.Generator().manual_seed(7),
        height=32,
        width=32,
        num_inference_steps=2,
        true_cfg_scale=3.0,
        output_type="np",
    ).images


@pytest.fixture(scope="module")
def untouched(teacher: Path) -> np.ndarray:
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    pipeline.set_progress_bar_config(disable=True)
    return draw(pipeline)


@pytest.fixture
def pipeline(teacher: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_all_students_then_the_teacher_again(pipeline: Any, trained: Path, untouched: np.ndarray) -> None:
    blocks = list(pipeline.transformer.transformer_blocks)
    board = plug(pipeline, trained / "plugs")
    assert board.plugged == board.names == PLUG_NAMES
    assert len(pipeline.transformer.transformer_blocks) == pipeline.transformer.config.num_layers == NUM_LAYERS - 2
    assert board.kept == {"transformer_blocks": [0, 1, 3, 5]}
    assert not np.array_equal(draw(pipeline), untouched)
    board()
    assert pipeline.transformer.config.num_layers == NUM_LAYERS
    assert all(a is b for a, b in zip(pipeline.transformer.transformer_blocks, blocks, strict=True))
    assert np.array_equal(draw(pipeline), untouched)


@pytest.mark.parametrize(("name", "kept"), [(FIRST, [0, 1, 3, 4, 5]), (SECOND, [0, 1, 2, 3, 5])])
def test_one_interval_switches_alone(
    pipeline: Any, trained: Path, untouched: np.ndarray, name: str, kept: list[int]
) -> None:
    blocks = list(pipeline.transformer.transformer_blocks)
    board = plug(pipeline, trained / "plugs")
    board(name)
    assert board.plugged == [name]
    assert board.kept == {"transformer_blocks": kept}
    assert pipeline.transformer.config.num_layers == len(pipeline.transformer.transformer_blocks) == NUM_LAYERS - 1
    student = board.students[name]
    for index, block in zip(kept, pipeline.transformer.transformer_blocks, strict=True):
        assert block is student or block is blocks[index]
    assert not np.array_equal(draw(pipeline), untouched)


def test_a_board_says_what_it_can_do_and_what_is_in(pipeline: Any, trained: Path) -> None:
    board = plug(pipeline, trained / "plugs")
    assert board.pipeline is pipeline
    assert f"Plugboard of QwenImageTransformer2DModel, 4 of {NUM_LAYERS} blocks\n" in repr(board)
    board(f"{FIRST}.removed")
    states = {line.split()[0]: line.split(maxsplit=1)[1] for line in repr(board).splitlines()[1:3]}
    assert states == {FIRST: "cut to its first block", SECOND: "teacher"}
    for name in states:
        board(name)
        assert f"  {name:<34} student" in repr(board)


def test_switching_has_no_memory(pipeline: Any, trained: Path) -> None:
    board = plug(pipeline, trained / "plugs")
    every = draw(pipeline)
    board.remove()
    removed = draw(pipeline)
    board(FIRST)
    board.all()
    assert np.array_equal(draw(pipeline), every)
    assert not np.array_equal(removed, every)
    board.arrange(students=[FIRST], removed=[SECOND])
    assert board.kept == {"transformer_blocks": [0, 1, 3, 5]}
    assert not np.array_equal(draw(pipeline), every)


def test_unknown_interval_is_named(pipeline: Any, trained: Path) -> None:
    board = plug(pipeline, trained / "plugs")
    with pytest.raises(UsageError, match=r"2-3 is no interval"):
        board("transformer_blocks.2-3")
    assert board.plugged == PLUG_NAMES


def test_folder_without_plugs_is_named(pipeline: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=str(tmp_path)):
        plug(pipeline, tmp_path)


def test_intervals_may_train_apart(settings: list[str], trained: Path, tmp_path: Path) -> None:
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=apart", "stages=[depth]"]
    succeed(*command, "distill.intervals=[1-2]")
    plugs = tmp_path / "apart" / "plugs"
    assert {path.stem for path in plugs.iterdir()} == {FIRST}
    first = modified(plugs)
    # Half of the students is not enough to draw with.
    missing = ppcl(*command, "stages=[generate]", "generate.variants=[ppcl-depth]")
    assert missing.code == 2
    assert SECOND in missing.err
    succeed(*command, "distill.intervals=[3-4]")
    assert first.items() <= modified(plugs).items()
    assert_same_tensors(plug_tensors(tmp_path / "apart"), plug_tensors(trained))
    # And both count as the whole: nothing is left to train.
    assert "reused" in succeed(*command).out


def test_sequential_mode_trains_other_weights(settings: list[str], trained: Path, tmp_path: Path) -> None:
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=chain", "distill.mode=sequential"]
    succeed(*command, "stages=[depth]")
    parallel, sequential = plug_tensors(trained), plug_tensors(tmp_path / "chain")
    assert parallel.keys() == sequential.keys()
    for name in PLUG_NAMES:
        assert any(not torch.equal(parallel[k], sequential[k]) for k in parallel if k.startswith(name)), name
    assert all(value.isfinite().all() for value in sequential.values())
