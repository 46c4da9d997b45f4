"""A LoRA of the full model: refused by the exported one, mapped by a stage, taken then."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import INTERVALS, NUM_LAYERS, digests, ppcl, succeed
from diffusers import DiffusionPipeline, QwenImagePipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from ppcl.errors import UsageError

STAGE = "stages=[remap_lora]"


def load(folder: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: DiffusionPipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    arguments = {"height": 32, "width": 32, "num_inference_steps": 2, "generator": generator}
    return np.asarray(pipeline(prompt="a red circle", **arguments).images[0]).astype(int)


@pytest.fixture(scope="module")
def lora(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one on every block of the teacher, as diffusers saves it."""
    transformer = load(teacher).transformer
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "img_mlp.net.2"]
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    metadata = transformer.peft_config["default"].to_dict()
    folder = tmp_path_factory.mktemp("lora")
    layers = get_peft_model_state_dict(transformer)
    QwenImagePipeline.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def command(settings: list[str], chain: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("mapped")
    return [
        *settings,
        f"paths.runs_dir={folder}",
        "name=mapped",
        STAGE,
        f"lora.path={lora}",
        f"lora.model={chain / 'export'}",
    ]


@pytest.fixture(scope="module")
def mapped(command: list[str]) -> Path:
    succeed(*command)
    runs = next(a for a in command if a.startswith("paths.runs_dir=")).partition("=")[2]
    return Path(runs) / "mapped" / "lora" / "pytorch_lora_weights.safetensors"


def test_an_unmapped_lora_is_refused_and_changes_nothing(chain: Path, lora: Path) -> None:
    pipeline = load(chain / "export")
    before = draw(pipeline)
    with pytest.raises(UsageError, match=r"stages=\[remap_lora\]"):
        pipeline.load_lora_weights(lora)
    assert np.array_equal(draw(pipeline), before)


def test_the_teacher_takes_it_as_ever(teacher: Path, lora: Path) -> None:
    pipeline = load(teacher)
    before = draw(pipeline)
    pipeline.load_lora_weights(lora)
    assert not np.array_equal(draw(pipeline), before)


def test_a_mapped_lora_is_that_of_the_kept_blocks_merged(chain: Path, teacher: Path, lora: Path, mapped: Path) -> None:
    """Of teacher blocks: a student takes block u's, so their weights differ from the merged teacher's by as much."""
    whole, pruned = load(teacher), load(chain / "export")
    plain = {name: value.clone() for name, value in whole.transformer.named_parameters()}
    start = {name: value.clone() for name, value in pruned.transformer.named_parameters()}
    for pipeline, path in ((whole, lora), (pruned, mapped)):
        pipeline.load_lora_weights(path)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    kept = pruned.transformer.config["ppcl"]["kept_layers"]["transformer_blocks"]
    assert len(kept) < NUM_LAYERS
    full = dict(whole.transformer.named_parameters())
    changed = 0
    for name, value in pruned.transformer.named_parameters():
        parts = name.split(".")
        original = ".".join([parts[0], str(kept[int(parts[1])]), *parts[2:]]) if parts[0].endswith("_blocks") else name
        expected = full[original] - plain[original]
        torch.testing.assert_close(value - start[name], expected, rtol=0, atol=1e-5)
        changed += bool(expected.any())
    assert changed == 5 * len(kept)


def test_the_stage_says_what_it_dropped_and_is_not_repeated(command: list[str], mapped: Path) -> None:
    record = json.loads(mapped.with_suffix(".json").read_text())
    assert record["dropped"]
    before = digests(mapped.parent)
    assert "reused" in succeed(*command).out
    assert digests(mapped.parent) == before


@pytest.mark.parametrize("source", ["mean", "sum"])
def test_students_may_take_it_from_all_their_blocks(command: list[str], chain: Path, source: str) -> None:
    """Ranks differ from module to module then, which a loader has to be told."""
    succeed(*command, f"name={source}", f"lora.source={source}")
    runs = next(a for a in command if a.startswith("paths.runs_dir=")).partition("=")[2]
    path = Path(runs) / source / "lora" / "pytorch_lora_weights.safetensors"
    assert json.loads(path.with_suffix(".json").read_text())["dropped"] == []
    pipeline = load(chain / "export")
    before = draw(pipeline)
    pipeline.load_lora_weights(path)
    assert not np.array_equal(draw(pipeline), before)


def test_a_lora_trained_on_the_pruned_model_needs_no_mapping(chain: Path, tmp_path: Path) -> None:
    transformer = load(chain / "export").transformer
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    QwenImagePipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(transformer))
    load(chain / "export").load_lora_weights(tmp_path)


@pytest.mark.parametrize("broken", ["missing.safetensors", "evil.bin", "cut.safetensors", "folder"])
def test_what_is_no_lora_is_refused(command: list[str], lora: Path, tmp_path: Path, broken: str) -> None:
    path = tmp_path / broken
    if broken == "evil.bin":
        path.write_bytes(pickle.dumps(print))
    elif broken == "cut.safetensors":
        path.write_bytes(lora.read_bytes()[:100])
    elif broken == "folder":
        path.mkdir()
    outcome = ppcl(*command, "name=broken", f"lora.path={path}")
    assert outcome.code == 2
    assert f"{path}" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    runs = next(a for a in command if a.startswith("paths.runs_dir=")).partition("=")[2]
    assert not (Path(runs) / "broken").exists()


def test_a_lora_needs_a_path_and_a_model(command: list[str], tmp_path: Path) -> None:
    outcome = ppcl(*command, "name=none", f"lora.model={tmp_path}")
    assert outcome.code == 2
    assert "holds no exported model" in outcome.err
    outcome = ppcl(*[a for a in command if not a.startswith("lora.path")])
    assert outcome.code == 2
    assert "lora.path" in outcome.err


def test_a_recovery_lora_loads_onto_the_untuned_export(settings: list[str], trained: Path, tmp_path: Path) -> None:
    tune = ["finetune.steps=3", "finetune.batch_size=4", "finetune.lora_rank=2", "finetune.lr=0.01"]
    command = [*settings, f"paths.runs_dir={tmp_path}", f"paths.base_run={trained}", INTERVALS, *tune]
    succeed(*command, "name=tuned", "stages=[finetune,export]")
    succeed(*command, "name=untuned", "stages=[export]", "export.variant=ppcl-depth")
    whole, recovered = load(tmp_path / "tuned" / "export"), load(tmp_path / "untuned" / "export")
    plain = {name: value.clone() for name, value in recovered.transformer.named_parameters()}
    recovered.load_lora_weights(tmp_path / "tuned" / "finetuned")
    recovered.fuse_lora()
    recovered.unload_lora_weights()
    tuned = dict(whole.transformer.named_parameters())
    assert tuned.keys() == plain.keys()
    for name, value in recovered.transformer.named_parameters():
        torch.testing.assert_close(value, tuned[name], rtol=0, atol=1e-6)
    changed = {name for name, value in tuned.items() if not torch.equal(value, plain[name])}
    assert changed
    assert all(name.startswith("transformer_blocks.") and name.endswith(".weight") for name in changed)
    outcome = ppcl(*command, "name=bad", "stages=[finetune]", "finetune.optimizer=muon")
    assert outcome.code == 2
    assert "finetune.lora_rank=2 does not go with finetune.optimizer=muon" in outcome.err
