"""Pretraining leaves a pipeline folder that every other stage takes as a teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import DIE_AT_RENAME, INTERVALS, NUM_LAYERS, assert_same_tensors, modified, ppcl, ppcl_process, succeed
from safetensors.torch import load_file

from ppcl.paths import ASSETS

WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")

TINY = [
    "stages=[pretrain]",
    f"pretrain.num_layers={NUM_LAYERS}",
    "pretrain.steps=4",
    "pretrain.batch_size=4",
    "pretrain.checkpoint_every=2",
    "trainer=cpu",
    "trainer.num_threads=1",
    "trainer.progress=false",
    "logger=none",
    "name=pretrained",
]


def weights(run: Path) -> dict:
    return load_file(run / "teacher" / WEIGHTS)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("pretrained")
    succeed(*TINY, f"paths.runs_dir={runs}")
    return runs / "pretrained"


def test_teacher_is_a_pipeline_folder(pretrained: Path) -> None:
    folder = pretrained / "teacher"
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "QwenImagePipeline"
    assert json.loads((folder / "transformer" / "config.json").read_text())["num_layers"] == NUM_LAYERS
    assert all(value.isfinite().all() for value in weights(pretrained).values())
    assert not list(pretrained.rglob("*.ckpt"))


def test_weights_were_trained(pretrained: Path) -> None:
    from ppcl.families.qwen_image.tiny import build_pipeline

    drawn = build_pipeline(0, NUM_LAYERS).transformer.state_dict()
    trained = weights(pretrained)
    assert trained.keys() == drawn.keys()
    assert any(not trained[key].float().equal(drawn[key].to(trained[key].dtype).float()) for key in drawn)


def test_other_stages_take_it(pretrained: Path, settings: list[str], tmp_path: Path) -> None:
    command = [argument for argument in settings if not argument.startswith("model.path=")]
    command += [f"model.path={pretrained / 'teacher'}", f"paths.runs_dir={tmp_path}", "name=after", INTERVALS]
    outcome = succeed(*command, "stages=[plan,generate]", "generate.variants=[teacher,removed]")
    assert "6 -> 4" in outcome.out
    assert len(list((tmp_path / "after" / "images").rglob("[0-9]*.png"))) == 24


def test_again_reuses_and_other_settings_are_refused(pretrained: Path) -> None:
    before = modified(pretrained / "teacher")
    command = [*TINY, f"paths.runs_dir={pretrained.parent}"]
    assert "reused" in succeed(*command).out
    refused = ppcl(*command, "pretrain.muon_lr=0.5")
    assert refused.code == 2
    assert "pretrain.muon_lr=0.02, now 0.5" in refused.err
    assert modified(pretrained / "teacher") == before


def test_dead_pretraining_resumes_exactly(pretrained: Path, tmp_path: Path) -> None:
    command = [*TINY, f"paths.runs_dir={tmp_path}"]
    # Four steps, a checkpoint after two: dies with the last batches trained and not saved.
    died = ppcl_process("*/teacher", *command, "pretrain.checkpoint_every=3", python=DIE_AT_RENAME)
    assert died.returncode == 9, died.stderr
    run = tmp_path / "pretrained"
    assert not (run / "teacher").exists()
    assert "resuming from" in succeed(*command).out
    assert_same_tensors(weights(run), weights(pretrained))
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]


def test_one_family_goes_on_from_another(tmp_path: Path) -> None:
    """Qwen-Image-Edit's transformer is Qwen-Image's, under a text encoder of its own."""
    edit = [*TINY, "model=tiny_qwen_image_edit", "pretrain.init=embedded:tiny_qwen_image", "pretrain.num_layers=20"]
    # Too small a step to leave the bits of bfloat16 in most weights.
    succeed(*edit, "pretrain.muon_lr=1e-9", "pretrain.adam_lr=1e-9", "pretrain.steps=1", f"paths.runs_dir={tmp_path}")
    folder = tmp_path / "pretrained" / "teacher"
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "QwenImageEditPipeline"
    found, start = weights(tmp_path / "pretrained"), load_file(ASSETS / "tiny_qwen_image" / WEIGHTS)
    assert found.keys() == start.keys()
    assert all(value.float().sub(start[key].float()).abs().max() < 1e-3 for key, value in found.items())


def test_a_text_encoder_is_trained_with_new_words_and_resumes_exactly(tmp_path: Path) -> None:
    """It goes on from a teacher without these words; pretraining killed between checkpoints ends the same."""
    command = [*TINY, "model=tiny_qwen_image_v2", "pretrain.init=embedded:tiny_qwen_image", "pretrain.num_layers=20"]
    command += ["pretrain.text_encoder_lr=1e-3", "pretrain.categories=[colors,color_position,text,text]"]
    succeed(*command, f"paths.runs_dir={tmp_path / 'whole'}")
    died = ppcl_process(
        "*/teacher",
        *command,
        "pretrain.checkpoint_every=3",
        f"paths.runs_dir={tmp_path / 'dead'}",
        python=DIE_AT_RENAME,
    )
    assert died.returncode == 9, died.stderr
    assert "resuming from" in succeed(*command, f"paths.runs_dir={tmp_path / 'dead'}").out
    whole, dead = (tmp_path / name / "pretrained" / "teacher" for name in ("whole", "dead"))
    encoders = [load_file(folder / "text_encoder" / "model.safetensors") for folder in (whole, dead)]
    assert_same_tensors(weights(tmp_path / "whole" / "pretrained"), weights(tmp_path / "dead" / "pretrained"))
    assert_same_tensors(*encoders)
    old = load_file(ASSETS / "tiny_qwen_image" / "text_encoder" / "model.safetensors")
    assert {value.dtype for value in encoders[0].values()} == {torch.float32}
    vocabularies = [
        json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
        for folder in (whole, ASSETS / "tiny_qwen_image")
    ]
    assert "\u0120X" in vocabularies[0].keys() - vocabularies[1].keys()
    name = next(name for name in old if name.endswith("embed_tokens.weight"))
    new, start = (
        table[name][vocabulary["\u0120circle"]]
        for table, vocabulary in zip((encoders[0], old), vocabularies, strict=True)
    )
    assert 0 < (new - start).abs().max() < 0.01


def test_an_untrained_dit_starts_as_the_identity(tmp_path: Path) -> None:
    smallest = ["pretrain.muon_lr=1e-9", "pretrain.adam_lr=1e-9", "pretrain.steps=1"]
    succeed(*TINY, "model=tiny_dit", *smallest, f"paths.runs_dir={tmp_path}")
    modulations = {k: v for k, v in weights(tmp_path / "pretrained").items() if "norm1.linear" in k}
    assert len(modulations) == 2 * NUM_LAYERS
    assert all(value.abs().max() <= 1e-8 for value in modulations.values())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["pretrain.init=/no/teacher"], "pretrain.init=/no/teacher is no teacher"),
        (["pretrain.init=embedded:tiny_qwen_image"], "has num_layers=20, and model=tiny_qwen_image 6"),
        (["pretrain.categories=[colors,prose]"], "pretrain.categories=prose is not one of single_object"),
        (["pretrain.categories=[]"], "pretrain.categories=[] names no category"),
        (["model.categories=[colors,colors]"], "model.categories names colors twice"),
        (["model=tiny_flux", "pretrain.text_encoder_lr=1e-3"], "pretrain.text_encoder_lr=0.001 goes only with"),
        (["model=tiny_flux", "model.categories=[text]"], "model.categories=['text'] goes only with"),
    ],
)
def test_what_cannot_be_continued_is_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    refused = ppcl(*TINY, *overrides, f"paths.runs_dir={tmp_path}")
    assert refused.code == 2
    assert said in refused.err
    assert not (tmp_path / "pretrained" / "teacher").exists()


def test_a_loss_that_is_not_a_number_stops(tmp_path: Path) -> None:
    change = ["pretrain.adam_lr=1000", "pretrain.warmup_steps=1", "pretrain.checkpoint_every=1"]
    outcome = ppcl(*TINY, *change, f"paths.runs_dir={tmp_path}")
    assert outcome.code == 2
    assert "pretrain.adam_lr=1000.0 made the loss" in outcome.err
    assert (tmp_path / "pretrained" / "pretrain-checkpoint" / "last.ckpt").exists()
    assert not (tmp_path / "pretrained" / "teacher").exists()
