"""Teachers in every form in which users have them go through the stages, and none is taken for another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from commands import INTERVALS, Outcome, plug_tensors, ppcl, succeed
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model"
EXPORT = ["stages=[export]", "export.variant=ppcl-depth"]


@pytest.fixture
def command(settings: list[str], tmp_path: Path) -> list[str]:
    """The common settings without a model's path."""
    kept = [argument for argument in settings if not argument.startswith("model.path=")]
    return [*kept, f"paths.runs_dir={tmp_path / 'runs'}"]


@pytest.fixture
def single(teacher: Path, tmp_path: Path) -> Path:
    """The teacher's transformer in one file, in the layout that ComfyUI reads."""
    state = load_file(teacher / "transformer" / f"{WEIGHTS}.safetensors")
    file = tmp_path / "comfy.safetensors"
    save_file({f"model.diffusion_model.{name}": value for name, value in state.items()}, file)
    return file


def test_a_bin_teacher_is_not_taken_for_another(command: list[str], teacher: Path, tmp_path: Path) -> None:
    """The second has other weights under the same name, of the same size, with the same ends."""
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    weights = folder / "transformer" / f"{WEIGHTS}.safetensors"
    state = load_file(weights)
    weights.unlink()
    probe = [*command, f"model.path={folder}", "stages=[probe]"]
    for name, factor in (("first", 1), ("second", 0.5)):
        state["transformer_blocks.2.attn.to_q.weight"] *= factor
        torch.save(state, weights.with_suffix(".bin"))
        assert "reused" not in succeed(*probe, f"name={name}").out
    assert len([*(tmp_path / "runs" / "cache" / "probes").iterdir()]) == 2
    refused = ppcl(*probe, "name=first", "model.streaming=true")
    assert_one_sentence(refused, f"{WEIGHTS}.bin is no safetensors file", "model.streaming=true")


def assert_one_sentence(outcome: Outcome, *fragments: str) -> None:
    assert outcome.code == 2, outcome.err
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert all(fragment in outcome.err for fragment in fragments), outcome.err


def test_a_variant_beside_a_backup_is_loaded_as_diffusers_does(
    command: list[str], teacher: Path, trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    weights = folder / "transformer" / f"{WEIGHTS}.safetensors"
    state = load_file(weights)
    weights.rename(weights.with_name(f"{WEIGHTS}.fp16.safetensors"))
    save_file({name: torch.zeros_like(value) for name, value in state.items()}, weights.with_name("zz.safetensors"))
    run = [*command, INTERVALS, f"model.path={folder}", "name=run", "stages=[depth]"]
    assert_one_sentence(ppcl(*run), "only weights of another variant: add model.variant=fp16")
    succeed(*run, "model.variant=fp16", "model.streaming=true")
    expected, found = plug_tensors(trained), plug_tensors(tmp_path / "runs" / "run")
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_single_file_goes_through_depth_and_export(
    command: list[str], teacher: Path, trained: Path, single: Path, tmp_path: Path
) -> None:
    run = [*command, INTERVALS, f"model.path={single}", f"model.base={teacher}", "name=run"]
    succeed(*run, "stages=[depth]", "model.streaming=true")
    expected, found = plug_tensors(trained), plug_tensors(tmp_path / "runs" / "run")
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    succeed(f"run={tmp_path / 'runs' / 'run'}", *EXPORT)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "runs" / "run" / "export", trust_remote_code=True)
    assert pipeline.transformer.config.num_layers == 4
    last = pipeline.transformer.transformer_blocks[3].attn.to_q.weight
    stored = load_file(teacher / "transformer" / f"{WEIGHTS}.safetensors")
    assert torch.equal(last, stored["transformer_blocks.5.attn.to_q.weight"])
    assert pipeline.text_encoder is not None


def test_a_base_with_a_lora_goes_through_depth_and_export(command: list[str], teacher: Path, tmp_path: Path) -> None:
    stored = load_file(teacher / "transformer" / f"{WEIGHTS}.safetensors")
    key = "transformer_blocks.5.attn.to_q"
    lora = {
        f"transformer.{key}.lora_A.weight": torch.randn(2, 64),
        f"transformer.{key}.lora_B.weight": torch.randn(64, 2),
    }
    save_file(lora, tmp_path / "style.safetensors")
    run = [*command, INTERVALS, f"model.path={teacher}", f"model.lora={tmp_path / 'style.safetensors'}", "name=run"]
    outcome = succeed(*run, "stages=[depth]", "model.streaming=true")
    assert "style.safetensors" in outcome.out
    succeed(*run, *EXPORT)
    transformer = QwenImageTransformer2DModel.from_pretrained(tmp_path / "runs" / "run" / "export" / "transformer")
    a, b = lora.values()
    merged = stored[f"{key}.weight"] + b @ a
    torch.testing.assert_close(transformer.transformer_blocks[3].attn.to_q.weight, merged)
    refused = ppcl(*command, INTERVALS, f"model.path={teacher}", "name=run", *EXPORT)
    assert_one_sentence(refused, "was distilled from another teacher")
