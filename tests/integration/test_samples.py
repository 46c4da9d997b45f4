"""When sample pictures are drawn during a training, and what is said where none are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import INTERVALS, assert_same_tensors, plug_tensors, ppcl_process, succeed, two_ranks
from PIL import Image

from ppcl.artifacts.samples import load_samples
from ppcl.command import prepare
from ppcl.memory.checks import needs, room_for_pictures
from ppcl.training.samples import picture_steps, why_no_pictures

DRAWN = ["watch.share=1000", "watch.pictures=1", "watch.prompts=2", "watch.picture_steps=2"]
WIDTH = ["width.source=given", "width.transformer_blocks.ffn=[0]"]
TINY = ["model=tiny_qwen_image", "name=samples", "trainer=cpu"]


@pytest.mark.parametrize(
    ("stage", "settings", "expected"),
    [
        ("depth", ["distill.steps=250", "distill.batch_size=16"], [0, 250]),
        ("depth", ["distill.steps=250", "distill.batch_size=64"], [0, 125, 250]),
        ("depth", ["distill.steps=6000", "distill.batch_size=2"], [0, 3000, 6000]),
        ("finetune", ["finetune.steps=1000", "finetune.batch_size=4"], [0, 500, 1000]),
        ("depth", ["distill.steps=6000", "distill.batch_size=2", "watch.prompts=13"], [0, 6000]),
        ("depth", ["distill.steps=6", "distill.batch_size=4"], []),
        ("depth", ["distill.steps=6", "watch.share=1000", "watch.pictures=9"], [0, 1, 2, 3, 4, 5, 6]),
        ("width", [*WIDTH, "width.steps=0", "watch.share=1000"], []),
        ("width", [*WIDTH, "width.steps=2000", "distill.batch_size=2"], [0, 2000]),
        ("depth", ["distill.steps=6000", "watch.pictures=0"], []),
    ],
)
def test_pictures_are_a_small_share_of_a_training(stage: str, settings: list[str], expected: list[int]) -> None:
    assert picture_steps(prepare([*TINY, f"stages=[{stage}]", *settings]), stage) == expected


@pytest.mark.parametrize(
    ("stage", "settings", "why"),
    [
        ("depth", ["distill.steps=6"], "6 steps are too few for watch.share=0.04"),
        ("depth", ["distill.from_boundaries=true"], "distill.from_boundaries=true trains without the teacher"),
        (
            "finetune",
            ["finetune.recorded=true", "finetune.feature_weight=0"],
            "finetune.recorded=true trains without the teacher",
        ),
        ("depth", ["model.streaming=true"], "model.streaming=true would read the whole model for each of their steps"),
        ("depth", ["distill.steps=6", "watch.pictures=0"], ""),
        ("depth", [], ""),
    ],
)
def test_a_training_without_pictures_says_why(stage: str, settings: list[str], why: str) -> None:
    assert why_no_pictures(prepare([*TINY, f"stages=[{stage}]", *settings]), stage) == why


def test_no_rank_has_a_whole_model_to_draw_with_if_it_is_sharded() -> None:
    run = prepare([*TINY, "stages=[depth]"])
    run.config.strategy.kind = "fsdp"
    assert why_no_pictures(run, "depth") == "strategy=fsdp leaves no rank a whole model"


def test_the_sentence_is_printed(settings: list[str], tmp_path: Path) -> None:
    said = succeed(*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=short", "stages=[depth]").out
    assert "depth  sample pictures are off: 6 steps are too few for watch.share=0.04" in said
    assert not (tmp_path / "short" / "training" / "samples").exists()


def test_pictures_are_off_where_they_do_not_fit_beside_the_training() -> None:
    """Qwen-Image: 41 GB of weights, a VAE of 0.25 GB, and 7.5 GB to decode a picture."""
    command = [
        "model=qwen_image",
        "name=samples",
        "explain=true",
        "stages=[depth]",
        "distill.groups=8",
        "trainer.memory_gb=200",
    ]
    run = prepare(command)
    (ample,) = needs(run)
    assert ample.device["VAE of sample pictures"] == pytest.approx(0.254e9, rel=0.01)
    assert room_for_pictures(run, "depth")
    (without,) = needs(prepare([*command, "watch.pictures=0"]))
    assert 0.2e9 < ample.total - without.total < 8e9
    tight = f"trainer.memory_gb={(1.05 * without.total + 1.2e9) / 1e9 + 0.1}"
    run = prepare([*command, tight])
    (need,) = needs(run)
    assert need.device == without.device
    assert "depth draws no sample pictures: they do not fit on the device beside the training" in need.note
    assert not room_for_pictures(run, "depth")


def test_two_ranks_draw_once_and_what_one_draws(settings: list[str], tmp_path: Path) -> None:
    command = [*settings, INTERVALS, *DRAWN, f"paths.runs_dir={tmp_path}", "stages=[depth]"]
    done = two_ranks(*command, "name=shared", "strategy=ddp")
    assert done.returncode == 0, done.stderr
    succeed(*command, "name=alone")
    drawn = {}
    for name in ("shared", "alone"):
        ((folder, record),) = load_samples(tmp_path / name)["depth"]
        drawn[name] = {path.name: path.read_bytes() for path in folder.glob("*.png") if "000006" not in path.name}
        assert record.steps == [0, 6]
    assert drawn["shared"] == drawn["alone"]  # at the start; sums over ranks round in another way


def test_wandb_shows_the_teacher_beside_the_pruned_model(settings: list[str], trained: Path, tmp_path: Path) -> None:
    command = [a for a in settings if a != "logger=none"]
    command += [INTERVALS, *DRAWN, f"paths.runs_dir={tmp_path}", "name=logged", "stages=[depth]"]
    done = ppcl_process(*command, "logger=wandb", "logger.mode=offline")
    assert done.returncode == 0, done.stderr
    pictures = list((tmp_path / "logged" / "wandb").glob("offline-run-*/files/media/images/depth/samples_*.png"))
    assert len(pictures) == 2 * 2
    assert {Image.open(path).size for path in pictures} == {(2 * 32 + 4, 32)}
    assert_same_tensors(plug_tensors(tmp_path / "logged"), plug_tensors(trained))


def test_other_prompts_are_drawn_from_then_on(settings: list[str], tmp_path: Path) -> None:
    """Pictures of other prompts cannot stand beside those of before, which are deleted."""
    command = [*settings, INTERVALS, *DRAWN, f"paths.runs_dir={tmp_path}", "name=other", "stages=[depth]"]
    succeed(*command)
    for path in (tmp_path / "other" / "plugs").iterdir():
        path.unlink()
    succeed(*command, "watch.prompts=1")
    ((folder, record),) = load_samples(tmp_path / "other")["depth"]
    assert len(record.prompts) == 1
    assert json.loads((folder / "samples.json").read_text())["num_steps"] == 6
    assert {path.name for path in folder.glob("*.png")} == {"teacher-0.png", "000000-0.png", "000006-0.png"}
