"""A LoRA of the full model: refused by the exported one, mapped by a stage, taken then."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import INTERVALS, NUM_LAYERS, digests, ppcl, succeed
from diffusers import DiffusionPipeline, QwenImagePipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

import ppcl as package
from ppcl.errors import UsageError

STAGE = "stages=[remap_lora]"


def load(folder: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: DiffusionPipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    arguments = {"height": 32, "width": 32, "num_inference_steps": 2, "generator": generator}
    guided = {"true_cfg_scale": 3.0, "negative_prompt": "", "max_sequence_length": 512}  # as the run draws
    return np.asarray(pipeline(prompt="a red circle", **arguments, **guided).images[0]).astype(int)


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


def few(lora: Path, folder: Path, blocks: set[str]) -> Path:
    """A file with the LoRA of these blocks only, and no metadata."""
    path = folder / "few.safetensors"
    save_file({key: value for key, value in load_file(lora).items() if key.split(".")[2] in blocks}, path)
    return path


def test_a_lora_of_any_blocks_of_the_full_model_is_refused(chain: Path, lora: Path, tmp_path: Path) -> None:
    """No number tells it from one of the pruned model: not few blocks, nor just the last of the pruned model."""
    pipeline = load(chain / "export")
    last = len(pipeline.transformer.transformer_blocks) - 1
    for blocks in ({"0"}, {str(last)}, {"0", str(last)}):
        path = few(lora, tmp_path, blocks)
        with pytest.raises(UsageError, match=r"lora.counts=pruned"):
            pipeline.load_lora_weights(path)
        with pytest.raises(UsageError, match=r"lora.counts=pruned"):
            pipeline.transformer.load_lora_adapter(path)  # which reads the file itself
    assert not hasattr(pipeline.transformer, "peft_config")


def test_a_lora_of_no_block_counts_none(chain: Path, tmp_path: Path) -> None:
    transformer = load(chain / "export").transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["proj_out"], init_lora_weights=False))
    QwenImagePipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(transformer))
    load(chain / "export").load_lora_weights(tmp_path)


def test_a_lora_trained_on_the_pruned_model_is_taken_if_the_caller_says_so(
    chain: Path, command: list[str], tmp_path: Path
) -> None:
    transformer = load(chain / "export").transformer
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False))
    metadata = transformer.peft_config["default"].to_dict()
    layers = get_peft_model_state_dict(transformer)
    QwenImagePipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=metadata)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    with pytest.raises(UsageError, match=r"lora.counts=pruned"):
        load(chain / "export").load_lora_weights(path)
    expected = {name: 3 * layers[f"{name}.lora_B.weight"] @ layers[f"{name}.lora_A.weight"] for name in bare(layers)}
    found = package.remap_lora(path, transformer, counts="pruned")
    assert not found.dropped
    succeed(*command, "name=own", f"lora.path={path}", "lora.counts=pruned")
    runs = next(a for a in command if a.startswith("paths.runs_dir=")).partition("=")[2]
    for state in (found.state, Path(runs) / "own" / "lora" / path.name):
        pipeline = load(chain / "export")
        pipeline.load_lora_weights(state, adapter_name="it")
        ours = {n: m for n, m in pipeline.transformer.named_modules() if "it" in getattr(m, "lora_A", {})}
        assert ours.keys() == expected.keys()
        for name, layer in ours.items():
            torch.testing.assert_close(layer.get_delta_weight("it"), expected[name])


def bare(state: dict[str, torch.Tensor]) -> set[str]:
    return {key.split(".lora_")[0] for key in state}


def test_the_transformer_alone_takes_a_mapped_file(chain: Path, mapped: Path) -> None:
    transformer = load(chain / "export").transformer
    transformer.load_lora_adapter(mapped, adapter_name="it")
    assert transformer.peft_config["it"].r == 4


def test_what_is_mapped_already_is_not_mapped_again(command: list[str], mapped: Path, chain: Path) -> None:
    outcome = ppcl(*command, "name=again", f"lora.path={mapped}")
    assert outcome.code == 2
    assert "already" in outcome.err
    state = package.remap_lora(mapped, load(chain / "export").transformer, counts="pruned").state
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in load_file(mapped).items()}


def test_what_does_not_fit_leaves_nothing(command: list[str], lora: Path, tmp_path: Path) -> None:
    """One name, what the model's are like, and no file."""
    path = tmp_path / "wan.safetensors"
    save_file({key.replace("attn.to_q", "attn.q"): value for key, value in load_file(lora).items()}, path)
    for arguments in ([f"lora.path={path}"], ["stages=[generate]", f"generate.loras=[{path}]"]):
        outcome = ppcl(*command, "name=misfit", *arguments)
        assert outcome.code == 2
        assert "attn.q is no layer" in outcome.err
        assert "transformer_blocks.0." in outcome.err
        assert len(outcome.err.splitlines()) == 1
    runs = next(a for a in command if a.startswith("paths.runs_dir=")).partition("=")[2]
    assert not [*(Path(runs) / "misfit").rglob("*.safetensors"), *(Path(runs) / "misfit").rglob("*.png")]


@pytest.fixture(scope="module")
def twice(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The teacher's six blocks cut to 0, 1, 3 and 5, and these cut to the first, second and last."""
    folder = tmp_path_factory.mktemp("twice")
    command = [*settings, f"paths.runs_dir={folder}", "stages=[export]", "export.variant=removed"]
    succeed(*command, "name=once", INTERVALS)
    succeed(*command, "name=twice", f"model.path={folder / 'once' / 'export'}", "intervals.transformer_blocks=[[1,2]]")
    return {name: folder / name / "export" for name in ("once", "twice")}


def entry(export: Path) -> dict[str, Any]:
    return json.loads((export / "transformer" / "config.json").read_text())["ppcl"]


def test_a_model_pruned_twice_counts_the_blocks_of_the_full_model(twice: dict[str, Path], teacher: Path) -> None:
    assert entry(twice["once"])["removed_intervals"] == {"transformer_blocks": [[1, 2], [3, 4]]}
    found = entry(twice["twice"])
    assert found["kept_layers"] == {"transformer_blocks": [0, 1, 5]}
    assert found["removed_intervals"] == {"transformer_blocks": [[1, 4]]}
    for name, path in twice.items():
        kept = entry(path)["kept_layers"]["transformer_blocks"]
        blocks, full = load(path).transformer.transformer_blocks, load(teacher).transformer.transformer_blocks
        for block, index in zip(blocks, kept, strict=True):
            assert torch.equal(block.attn.to_q.weight, full[index].attn.to_q.weight), (name, index)


def test_a_lora_reaches_the_right_blocks_of_a_model_pruned_twice(twice: dict[str, Path], lora: Path) -> None:
    """Of the full model, and of the model in between, whose LoRA says that it counts that one's blocks."""
    full = load_file(lora)
    once, pruned = (load(twice[name]).transformer for name in ("once", "twice"))
    state = package.remap_lora(lora, once).state
    for given in (lora, state):
        found = package.remap_lora(given, pruned)
        assert {int(name.split(".")[1]) for name in found.layers} == {0, 1, 2}
        for name in found.layers:
            _, place, *inner = name.split(".")
            a, b = (found.state[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
            original = ".".join(["transformer.transformer_blocks", str([0, 1, 5][int(place)]), *inner])
            expected = 2 * full[f"{original}.lora_B.weight"] @ full[f"{original}.lora_A.weight"]
            torch.testing.assert_close(b @ a, expected)
    with pytest.raises(UsageError, match="another pruned model"):
        package.remap_lora(package.remap_lora(lora, pruned).state, once)
    with pytest.raises(UsageError, match="another pruned model"):
        once.load_lora_adapter(package.remap_lora(lora, pruned).state)


def test_loras_are_drawn_with_a_teacher_that_was_pruned(
    twice: dict[str, Path], settings: list[str], lora: Path, tmp_path: Path
) -> None:
    """Pictures of the teacher and of `removed`, which is the model pruned twice."""
    command = [*settings, f"paths.runs_dir={tmp_path}", f"model.path={twice['once']}", "stages=[generate]"]
    command += ["intervals.transformer_blocks=[[1,2]]", 'generate.prompt="a red circle"', f"generate.loras=[{lora}]"]
    succeed(*command, "name=drawn", "generate.variants=[teacher,removed]", "seed=0")
    for variant, name in (("teacher", "once"), ("removed", "twice")):
        pipeline = load(twice[name])
        plain = draw(pipeline)
        pipeline.load_lora_weights(package.remap_lora(lora, pipeline.transformer).state)
        (path,) = (tmp_path / "drawn").glob(f"images/*/{variant}/0*.png")
        found = np.asarray(Image.open(path)).astype(int)
        assert np.array_equal(found, draw(pipeline))
        assert not np.array_equal(found, plain)


def test_a_controlnets_residuals_reach_the_right_blocks_of_a_model_pruned_twice(twice: dict[str, Path]) -> None:
    """Six residuals for six blocks: blocks 0, 1 and 5 are left."""
    transformer = load(twice["twice"]).transformer
    seen: list[Any] = []
    package.place_residuals(transformer)

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.extend(kwargs["controlnet_block_samples"])
        raise StopIteration

    transformer.register_forward_pre_hook(keep, with_kwargs=True)
    with pytest.raises(StopIteration):
        transformer(controlnet_block_samples=list(range(6)))
    assert seen == [0, 1, 5]


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
