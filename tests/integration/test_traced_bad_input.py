"""Pipelines that cannot be pruned, and prompts and recordings that cannot be used, are refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import ppcl, succeed
from diffusers import ChromaPipeline, ChromaTransformer2DModel
from safetensors.torch import load_file, save_file

from tests.models_tiny.cases import CASES
from tests.pipelines_tiny import first_parts as parts
from tests.pipelines_tiny import flux2
from tests.pipelines_tiny.saving import flow_scheduler, saved, seed

SMALL = [
    "model=auto",
    "trainer=cpu",
    "logger=none",
    "model.sampling.num_inference_steps=2",
    "model.sampling.height=64",
    "model.sampling.width=64",
    "probe.num_batches=1",
    "probe.num_heldout_batches=1",
    "probe.batch_size=2",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX.2."""
    return flux2.build(tmp_path_factory.mktemp("flux2") / "teacher")


@pytest.fixture(scope="module")
def recording(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recording of that FLUX.2 on three prompts."""
    folder = tmp_path_factory.mktemp("recorded")
    prompts = _prompts(folder)
    command = [f"model.path={teacher}", f"data.path={prompts}", f"paths.runs_dir={folder}", "stages=[cache]"]
    succeed(*SMALL, *flux2.SETTINGS, *command)
    (found,) = (folder / "cache" / "recordings").iterdir()
    return found


def _prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("a red circle\na green cross\na blue square\n")
    return path


def refused(runs: Path, *arguments: str) -> str:
    """Run a command that must be refused before anything is recorded, traced or probed, and return the sentence."""
    outcome = ppcl(*SMALL, f"paths.runs_dir={runs}", *arguments)
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    (sentence,) = outcome.err.strip().splitlines()
    assert not [path for kind in ("recordings", "traces", "probes") for path in (runs / "cache").glob(f"{kind}/*/*")]
    return sentence


def _folder(folder: Path, pipeline: str, **components: list[str]) -> Path:
    """Write a pipeline folder that has no weights."""
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **components}))
    return folder


def _unet(folder: Path) -> Path:
    return _folder(folder, "StableDiffusionPipeline", unet=["diffusers", "UNet2DConditionModel"])


def _transformer(folder: Path, pipeline: str, name: str, **config: Any) -> Path:
    found = _folder(folder, pipeline, transformer=["diffusers", name])
    (found / "transformer").mkdir()
    (found / "transformer" / "config.json").write_text(json.dumps({"_class_name": name, **config}))
    return found


def _paired_stacks(folder: Path) -> Path:
    name = "LatteTransformer3DModel"
    return _transformer(folder, "LattePipeline", name, **CASES[name].config)


def _unequal_blocks(folder: Path) -> Path:
    name = "SD3Transformer2DModel"
    config = CASES[name].config | {"dual_attention_layers": [0, 2, 4]}
    return _transformer(folder, "StableDiffusion3Pipeline", name, **config)


def _unknown_class(folder: Path) -> Path:
    return _transformer(folder, "TomorrowPipeline", "TomorrowTransformer2DModel")


def _unknown_pipeline(folder: Path) -> Path:
    name = "SD3Transformer2DModel"
    return _transformer(folder, "TomorrowPipeline", name, **CASES[name].config)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (_unet, "holds a StableDiffusionPipeline without a transformer (unet)"),
        (_paired_stacks, "num_layers counts transformer_blocks and temporal_transformer_blocks at once"),
        (
            _unequal_blocks,
            "SD3Transformer2DModel cannot be pruned: transformer_blocks: its blocks are of unequal kinds",
        ),
        (_unknown_class, "holds a TomorrowTransformer2DModel, which diffusers"),
        (_unknown_pipeline, "holds a TomorrowPipeline, which diffusers"),
    ],
)
def test_a_pipeline_that_cannot_be_pruned_is_refused_by_its_config(
    build: Callable[[Path], Path], words: str, tmp_path: Path
) -> None:
    model, data = f"model.path={build(tmp_path / 'model')}", f"data.path={_prompts(tmp_path)}"
    assert words in refused(tmp_path / "runs", model, data, "stages=[cache]")


def test_a_quantised_transformer_is_refused(teacher: Path, tmp_path: Path) -> None:
    model = shutil.copytree(teacher, tmp_path / "model")
    config = json.loads((model / "transformer" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model / "transformer" / "config.json").write_text(json.dumps(config))
    found = refused(tmp_path / "runs", f"model.path={model}", f"data.path={_prompts(tmp_path)}", "stages=[cache]")
    assert "has a quantised transformer (bitsandbytes)" in found


@pytest.mark.parametrize("part", ["vae", "tokenizer"])
def test_a_folder_without_a_part_that_its_index_names_is_refused(teacher: Path, tmp_path: Path, part: str) -> None:
    model = shutil.copytree(teacher, tmp_path / "model")
    shutil.rmtree(model / part)
    found = refused(tmp_path / "runs", f"model.path={model}", f"data.path={_prompts(tmp_path)}", "stages=[cache]")
    assert f"{model} lacks {part}/, which its model_index.json names: fetch it again." in found


def test_an_argument_that_the_pipeline_does_not_take_is_refused(teacher: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red circle"}\n{"prompt": "a green cross", "heigth": 64}\n')
    found = refused(tmp_path / "runs", f"model.path={teacher}", f"data.path={prompts}", "stages=[cache]")
    assert f"data.path={prompts}, line 2: heigth is no argument of the pipeline, which takes" in found


@pytest.mark.parametrize("name", ["prompts.csv", "prompts.md", "prompts"])
def test_a_file_that_is_not_known_to_be_of_prompts_is_refused(teacher: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("prompt\na red circle\n")
    found = refused(tmp_path / "runs", f"model.path={teacher}", f"data.path={tmp_path / name}", "stages=[cache]")
    assert f"data.path={tmp_path / name} is taken for pictures" in found
    assert "give data.path=prompts.txt with a prompt a line" in found


def test_the_ending_of_a_file_of_prompts_is_known_in_capitals(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "PROMPTS.TXT").write_text("a red circle\n")
    found = refused(
        tmp_path / "runs", f"model.path={teacher}", f"data.path={tmp_path / 'PROMPTS.TXT'}", "stages=[cache]"
    )
    assert "holds one prompt" in found


def test_prompts_and_a_recording_at_once_are_refused(teacher: Path, recording: Path, tmp_path: Path) -> None:
    data = [f"data.path={_prompts(tmp_path)}", f"data.cache={recording}"]
    found = refused(tmp_path / "runs", f"model.path={teacher}", *data, "stages=[probe]")
    assert f"data.cache={recording} are both given: leave one out" in found


@pytest.mark.parametrize("stage", ["cache", "probe"])
def test_a_streamed_teacher_that_was_not_traced_is_refused(
    teacher: Path, recording: Path, tmp_path: Path, stage: str
) -> None:
    data = [f"data.path={_prompts(tmp_path)}"] if stage == "cache" else ["data=prompts", f"data.cache={recording}"]
    found = refused(tmp_path / "runs", f"model.path={teacher}", *data, "model.streaming=true", f"stages=[{stage}]")
    assert f"was not traced yet, which takes the whole teacher: run 'stages=[{stage}]' in a command of its own" in found
    cache = f"paths.cache_dir={recording.parents[1]}"
    if stage == "probe":
        succeed(
            *SMALL,
            f"paths.runs_dir={tmp_path}",
            cache,
            f"model.path={teacher}",
            *data,
            "model.streaming=true",
            "stages=[probe]",
        )


def test_boundaries_of_calls_of_several_shapes_are_refused(teacher: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = ({"prompt": f"a circle {side}", "height": side} for side in (64, 96, 64, 96))
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    where = [f"model.path={teacher}", f"data.path={prompts}", f"paths.runs_dir={tmp_path}", "distill.steps=2"]
    intervals = "intervals.names=[transformer_blocks.1-2]"
    outcome = ppcl(*SMALL, *flux2.SETTINGS, *where, intervals, "distill.batch_size=4", "stages=[cache,boundaries]")
    assert outcome.code == 2
    assert "distill.batch_size=4: samples of a batch have several shapes" in outcome.err
    assert "set distill.batch_size=1" in outcome.err
    assert not list((tmp_path / "cache" / "boundaries").rglob("*.safetensors"))


def test_a_recording_of_another_model_is_refused(teacher: Path, recording: Path, tmp_path: Path) -> None:
    model = shutil.copytree(teacher, tmp_path / "model")
    (weights,) = (model / "transformer").glob("*.safetensors")
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    data = ["data=prompts", f"data.cache={recording}"]
    found = refused(tmp_path / "runs", f"model.path={model}", *data, "stages=[probe]")
    assert f"data.cache={recording} was recorded with model.weights=" in found
    assert found.endswith("record this model by data.path.")


@pytest.mark.parametrize("lost", ["000002.json", "000001.safetensors", "half of 000001.safetensors"])
def test_a_recording_that_was_cut_short_is_refused(teacher: Path, recording: Path, lost: str, tmp_path: Path) -> None:
    copy = shutil.copytree(recording, tmp_path / "recording")
    file = copy / lost.rpartition(" ")[2]
    if lost.startswith("half"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    data = ["data=prompts", f"data.cache={copy}"]
    found = refused(tmp_path / "runs", f"model.path={teacher}", *data, "stages=[probe]")
    assert file.name in found
    assert "stages=[cache]" in found


def test_a_model_whose_modulation_counts_its_blocks_is_refused_after_one_prompt(tmp_path: Path) -> None:
    seed()
    text_encoder, tokenizer = parts.t5(40)
    case = CASES["ChromaTransformer2DModel"]
    transformer = ChromaTransformer2DModel(**(case.config | {"in_channels": 16}))
    whole = {"scheduler": flow_scheduler(), "vae": parts.picture_vae(4), "transformer": transformer}
    model = saved(tmp_path / "model", ChromaPipeline, **whole, text_encoder=text_encoder, tokenizer=tokenizer)
    where = [f"model.path={model}", f"data.path={_prompts(tmp_path)}", f"paths.runs_dir={tmp_path / 'runs'}"]
    outcome = ppcl(*SMALL, *where, "model.sampling.max_sequence_length=16", "stages=[cache,probe]")
    assert outcome.code == 2
    assert "ChromaTransformer2DModel cannot be traced: transformer_blocks: temb of transformer_blocks.0" in outcome.err
    assert len(list((tmp_path / "runs").rglob("0*.json"))) == 1


def test_a_model_without_a_folder_is_estimated_by_its_configuration(tmp_path: Path) -> None:
    stages = "stages=[cache,probe,detect,depth]"
    prompts, runs = f"data.path={_prompts(tmp_path)}", f"paths.runs_dir={tmp_path / 'runs'}"
    outcome = ppcl("model=z_image", prompts, runs, stages, "explain=true", "trainer.memory_gb=80")
    assert outcome.code == 0, outcome.err
    assert "teacher 12.3" in outcome.out  # 6.15B parameters in bfloat16
    assert "activations are not counted" in outcome.out


def test_a_modular_pipeline_is_refused_as_such(tmp_path: Path) -> None:
    index = {"_class_name": "QwenImageModularPipeline", "_diffusers_version": "0.42.1"}
    (tmp_path / "modular_model_index.json").write_text(json.dumps(index), encoding="utf-8")
    outcome = ppcl("model=auto", f"model.path={tmp_path}", "data=prompts", "data.path=none.txt", "stages=[cache]")
    assert outcome.code == 2
    assert f"model.path={tmp_path} is a modular pipeline" in outcome.err
