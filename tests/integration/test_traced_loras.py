"""LoRAs of a model that is traced: trained in fine-tuning, mapped by a stage, put onto variants and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import INTERVALS, digests, ppcl, succeed
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tests.pipelines_tiny import pixart_sigma, sana

TRAINED = ["finetune.lora_rank=2", "finetune.steps=2", "finetune.batch_size=2", "finetune.lr=0.01"]
SHORT = ["distill.mode=none", "model.sampling.num_inference_steps=2"]
SHORT += ["model.sampling.height=64", "model.sampling.width=64", "trainer=cpu", "logger=none"]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The beginning of a command on a tiny Sana, which ppcl knows nothing of."""
    folder = tmp_path_factory.mktemp("sana")
    teacher, prompts = sana.build(folder / "teacher"), folder / "prompts.txt"
    prompts.write_text("a red circle\na green cross\n")
    paths = [f"model.path={teacher}", f"data.path={prompts}", f"paths.runs_dir={folder}"]
    return ["model=auto", *paths, INTERVALS, *SHORT, *sana.SETTINGS]


@pytest.fixture(scope="module")
def folder(command: list[str]) -> Path:
    """The folder of a run that tuned a LoRA and exported the result."""
    succeed(*command, "name=tuned", "stages=[cache,finetune,export]", *TRAINED)
    (runs,) = (Path(a.partition("=")[2]) for a in command if a.startswith("paths.runs_dir="))
    return runs


@pytest.fixture(scope="module")
def lora(folder: Path) -> Path:
    """A random LoRA on every block of the teacher with PEFT's names, also on its convolutions."""
    transformer = load(folder / "teacher").transformer
    torch.manual_seed(0)
    targets = ["to_q", "to_out.0", "conv_inverted", "proj_out"]
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    state = get_peft_model_state_dict(transformer)
    save_file({f"base_model.model.{key}": value for key, value in state.items()}, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def load(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder)


def merged(pipeline: Any, lora: Path | dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of the pipeline's transformer with a LoRA added to them."""
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    state: dict[str, torch.Tensor] = pipeline.transformer.state_dict()
    return state


def test_a_recovery_lora_loads_onto_the_untuned_export(folder: Path, command: list[str]) -> None:
    succeed(*command, "name=untuned", "stages=[export]", "export.variant=removed")
    plain = load(folder / "untuned" / "export").transformer.state_dict()
    tuned = load(folder / "tuned" / "export").transformer.state_dict()
    found = merged(load(folder / "untuned" / "export"), folder / "tuned" / "finetuned")
    assert found.keys() == tuned.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, tuned[name], rtol=0, atol=1e-6)
    assert any(not torch.equal(value, plain[name]) for name, value in tuned.items())


def test_the_stage_maps_one_and_variants_are_drawn_with_it(folder: Path, command: list[str], lora: Path) -> None:
    export = folder / "tuned" / "export"
    before = load(export).transformer.state_dict()
    drawn = ["generate.variants=[ppcl-finetuned]", "generate.prompt='a red circle'"]
    again = [*command, "name=tuned", *TRAINED]
    succeed(
        *again,
        "stages=[remap_lora,generate]",
        f"lora.path={lora}",
        f"generate.loras=[{lora}]",
        "generate.name=with",
        *drawn,
    )
    found = merged(load(export), folder / "tuned" / "lora" / "lora.safetensors")
    full = load_file(lora)
    kept = load(export).transformer.config["ppcl"]["kept_layers"]["transformer_blocks"]
    for place, index in enumerate(kept):
        ours, theirs = (f"transformer_blocks.{number}.attn1.to_q" for number in (place, index))
        a, b = (full[f"base_model.model.{theirs}.lora_{side}.weight"] for side in "AB")
        added = found[f"{ours}.weight"] - before[f"{ours}.weight"]
        torch.testing.assert_close(added, b @ a, rtol=0, atol=1e-5)
    succeed(*again, "stages=[generate]", "generate.name=without", *drawn)
    pictures = [folder / "tuned" / "images" / name / "ppcl-finetuned" for name in ("with", "without")]
    one, other = ((each / "00000.png").read_bytes() for each in pictures)
    assert one != other


def test_one_that_is_merged_into_the_teacher_is_in_its_export(folder: Path, command: list[str], lora: Path) -> None:
    succeed(*command, "name=merged", "stages=[export]", "export.variant=removed", f"model.lora={lora}")
    exported = load(folder / "merged" / "export").transformer
    renamed = {key.replace("base_model.model.", "transformer.", 1): value for key, value in load_file(lora).items()}
    whole = merged(load(folder / "teacher"), renamed)
    (kept,) = exported.config["ppcl"]["kept_layers"].values()
    for place, index in enumerate(kept):
        name = "transformer_blocks.{}.ff.conv_inverted.weight"
        assert torch.equal(exported.state_dict()[name.format(place)], whole[name.format(index)])


def test_a_pipeline_that_loads_none_is_refused_before_anything_is_made(command: list[str], tmp_path: Path) -> None:
    teacher = pixart_sigma.build(tmp_path / "teacher")
    before = digests(tmp_path)
    settings = [f"model.path={teacher}", f"paths.runs_dir={tmp_path / 'runs'}", "stages=[cache,finetune]", *TRAINED]
    outcome = ppcl(*command, *settings)
    assert outcome.code == 2
    assert f"finetune.lora_rank=2: the pipeline of model.path={teacher} cannot load LoRAs in diffusers" in outcome.err
    assert digests(tmp_path) == before
