"""Quantised from the command line: what the folder holds, what it draws, what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import (
    BATCH,
    DIE_AT_RENAME,
    INTERVALS,
    NUM_PROMPTS,
    assert_same_tensors,
    modified,
    ppcl,
    ppcl_process,
    succeed,
)
from diffusers import DiffusionPipeline, QwenImagePipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from ppcl.export.quantized import num_bytes, torchao_config, weight_bytes
from ppcl.families.registry import get_family
from ppcl.ops.losses import relative_error

SETS = ["width.source=given", "width.transformer_blocks.text=[3,5]", "width.transformer_blocks.ffn=[1,3]"]
WIDTH = [INTERVALS, *SETS, "width.steps=2", "width.num_batches=2"]
INT4 = ["quantize=int4", "quantize.group_size=32", "quantize.num_batches=2", "quantize.batch_size=8"]
VARIANTS = "generate.variants=[teacher,ppcl-width,ppcl-quantized]"
KEPT = ("img_in", "txt_in", "time_text_embed", "norm_out", "proj_out", "txt_proj", "ehs_proj", "ffn_proj")


def load(folder: Path, **options: Any) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def parts(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that is stored: of quantised weights integers, scales and zero points."""
    found = {}
    for name, tensor in model.state_dict().items():
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        found |= {f"{name}.{part}": getattr(tensor, part) for part in inner} or {name: tensor}
    return found


def quantized_names(model: torch.nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and hasattr(module.weight, "__tensor_flatten__")
    }


def told(folder: Path) -> dict[str, Any]:
    """What the folder tells diffusers about how it is quantised."""
    return json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]


@pytest.fixture(scope="module")
def command(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*settings, *WIDTH, f"paths.runs_dir={tmp_path_factory.mktemp('runs')}", "name=few"]


@pytest.fixture(scope="module")
def run(command: list[str]) -> Path:
    """The folder of a run that pruned depth and width and quantised. Read it, do not write."""
    succeed(*command, *INT4, VARIANTS, "stages=[depth,width,export,quantize,generate,evaluate,report]")
    return Path(next(a for a in command if a.startswith("paths.runs_dir=")).partition("=")[2]) / "few"


@pytest.fixture
def again(settings: list[str], run: Path, tmp_path: Path) -> list[str]:
    """The same on a copy of that run without what was quantised, drawn and scored, which may be changed."""
    for folder in ("plugs", "plan", "export"):
        shutil.copytree(run / folder, tmp_path / "few" / folder)
    return [*settings, *WIDTH, f"paths.runs_dir={tmp_path}", "name=few", "stages=[quantize]"]


@pytest.fixture(scope="module")
def pipeline(run: Path) -> Any:
    return load(run / "quantized")


def test_the_folder_draws_what_the_run_drew(run: Path, pipeline: Any) -> None:
    folder = run / "images" / "shapes" / "ppcl-quantized"
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()][:BATCH]
    prompts = [line["prompt"] for line in lines]
    generators = [torch.Generator().manual_seed(line["seed"]) for line in lines]
    sampling = {"height": 32, "width": 32, "num_inference_steps": 2, "true_cfg_scale": 3.0}
    images = pipeline(prompts, negative_prompt=[""] * BATCH, generator=generators, **sampling).images
    for image, line in zip(images, lines, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(folder / line["image"]).convert("RGB")))
    unquantized = run / "images" / "shapes" / "ppcl-width"
    assert any(
        not np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(unquantized / path.name)))
        for path in folder.glob("0*.png")
    )
    assert len(list(folder.glob("0*.png"))) == NUM_PROMPTS


def test_saved_again_it_is_the_same_bits(pipeline: Any, tmp_path: Path) -> None:
    before = parts(pipeline.transformer)
    pipeline.transformer.save_pretrained(tmp_path)
    again = type(pipeline.transformer).from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_tensors(parts(again), before)
    assert quantized_names(again) == quantized_names(pipeline.transformer)
    qdata = [value for key, value in before.items() if key.endswith(".qdata")]
    assert min(value.min().item() for value in qdata) >= -8
    assert max(value.max().item() for value in qdata) <= 7


def test_what_is_skipped_is_untouched(run: Path, pipeline: Any) -> None:
    export, found = load(run / "export").transformer, pipeline.transformer
    names = quantized_names(found)
    linears = {name for name, module in export.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = {name for name in linears if any(part in name for part in KEPT)}
    assert names == linears - kept
    assert any("txt_proj" in name for name in kept)
    assert any("img_ffn_proj" in name for name in kept)
    theirs = export.state_dict()
    for key, value in found.state_dict().items():
        if key.rpartition(".")[0] not in names:
            assert torch.equal(value, theirs[key]), key
    record = json.loads((run / "quantized" / "ppcl.json").read_text())
    assert set(record["quantized"]) == names
    assert record["weight_bytes"] == weight_bytes(found)
    assert record["unquantized_bytes"] == weight_bytes(export)
    assert set(told(run / "quantized")["modules_to_not_convert"]) == kept


def test_bytes_and_parameters_are_counted_truly(run: Path, pipeline: Any) -> None:
    rows = {row["name"]: row for row in json.loads((run / "report" / "report.json").read_text())["variants"]}
    assert rows["ppcl-quantized"]["params"] == rows["ppcl-width"]["params"]
    assert rows["ppcl-quantized"]["num_layers"] == rows["ppcl-width"]["num_layers"]
    resident = weight_bytes(pipeline.transformer) / 1e6
    whole = sum(parameter.numel() * 4 for parameter in load(run / "export").transformer.parameters()) / 1e6
    assert resident < 0.5 * whole
    peaks = {name: row["peak_memory_mb"] for name, row in rows.items()}
    assert resident < peaks["ppcl-quantized"] < peaks["ppcl-width"] - (whole - resident) / 2
    stored = sum(file.stat().st_size for file in (run / "quantized" / "transformer").glob("*.safetensors"))
    assert stored > 1e6 * resident  # and metadata
    weight = pipeline.transformer.transformer_blocks[0].attn.to_q.weight
    assert num_bytes(weight) == 64 * 64 + 64 * 2 * 8


def test_least_squares_beat_the_nearest(again: list[str], run: Path, pipeline: Any, tmp_path: Path) -> None:
    """In the velocity on data that neither was fitted to."""
    from ppcl.config import DataConfig
    from ppcl.data.streams import ShapesStream

    succeed(*again, *INT4, "quantize.rounding=nearest")
    nearest, export = load(tmp_path / "few" / "quantized"), load(run / "export")
    family = get_family("qwen_image", export.transformer.config)
    batch = ShapesStream(family, export, DataConfig(), seed=7, batch_size=16)(0)
    with torch.no_grad():
        found = [part.transformer(**batch.inputs)[0] for part in (export, nearest, pipeline)]
    errors = [relative_error(velocity, found[0]).item() for velocity in found[1:]]
    assert 0 < errors[1] < 0.5 * errors[0], errors


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_to_the_nearest_it_is_what_diffusers_quantises(
    again: list[str], run: Path, tmp_path: Path, scheme: str
) -> None:
    options = ["quantize=int8"] if scheme == "int8" else [*INT4[:2], "quantize.rounding=nearest"]
    outcome = succeed(*again, *options)
    assert f"layers in {scheme}" in outcome.out
    ours = load(tmp_path / "few" / "quantized").transformer
    config = told(tmp_path / "few" / "quantized")
    asked = torchao_config(scheme, 32 if scheme == "int4" else None, config["modules_to_not_convert"])
    assert asked.to_dict() == config
    theirs = type(ours).from_pretrained(run / "export" / "transformer", quantization_config=asked, dtype=torch.float32)
    assert_same_tensors(parts(ours), parts(theirs))


def test_int8_too_can_be_fitted(again: list[str], tmp_path: Path) -> None:
    succeed(*again, "quantize=int8", "quantize.rounding=least_squares", *INT4[2:])
    model = load(tmp_path / "few" / "quantized").transformer
    assert {type(model.get_submodule(name).weight.data).__name__ for name in quantized_names(model)} == {"Int8Tensor"}


def test_asked_again_it_is_reused_and_asked_otherwise_refused(command: list[str], run: Path) -> None:
    before = modified(run / "quantized")
    assert "quantize  reused" in succeed(*command, *INT4, "stages=[quantize]").out
    assert modified(run / "quantized") == before
    for key, value, difference in (
        ("quantize.group_size", 16, "quantize.group_size=32, now 16"),
        ("quantize.rounding", "nearest", "quantize.rounding='least_squares', now 'nearest'"),
        ("quantize.damping", 0.01, "quantize.with.damping=0.001, now 0.01"),
        ("data.calibration_seed", 9, "quantize.with.data.seed=1, now 9"),
    ):
        rest = [item for item in INT4 if not item.startswith(f"{key}=")]
        outcome = ppcl(*command, *rest, f"{key}={value}", "stages=[quantize]")
        assert outcome.code == 2
        assert difference in outcome.err, outcome.err
        assert "name=" in outcome.err
    assert modified(run / "quantized") == before


def test_the_teacher_itself_can_be_quantised_without_any_intervals(settings: list[str], tmp_path: Path) -> None:
    stages = ["stages=[quantize,generate]", "generate.variants=[ppcl-quantized]", "quantize.variant=teacher"]
    succeed(*settings, f"paths.runs_dir={tmp_path}", "name=whole", "model.dtype=bfloat16", *INT4, *stages)
    index = json.loads((tmp_path / "whole" / "quantized" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "QwenImageTransformer2DModel"]
    assert len(list((tmp_path / "whole" / "images" / "shapes" / "ppcl-quantized").glob("0*.png"))) == NUM_PROMPTS
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "whole" / "quantized", dtype=torch.bfloat16)
    weight = pipeline.transformer.transformer_blocks[0].attn.to_q.weight
    assert weight.dtype == weight.scale.dtype == weight.zero_point.dtype == torch.bfloat16


def test_a_lora_goes_onto_quantised_weights(again: list[str], run: Path, teacher: Path, tmp_path: Path) -> None:
    transformer = load(teacher).transformer
    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "img_mlp.net.2"], init_lora_weights=False))
    QwenImagePipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(transformer))
    shutil.copytree(run / "quantized", tmp_path / "few" / "quantized")
    own = ["stages=[generate]", "generate.variants=[ppcl-quantized]", "generate.prompt=a red circle"]
    own.append("generate.name=prompts")
    picture = tmp_path / "few" / "images" / "prompts" / "ppcl-quantized" / "00000.png"
    drawn = []
    for loras in ("[]", f"[{tmp_path / 'lora' / 'pytorch_lora_weights.safetensors'}]"):
        succeed(*again[:-1], *own, f"generate.loras={loras}")
        drawn.append(np.asarray(Image.open(picture).convert("RGB")))
        shutil.rmtree(picture.parent)
    assert not np.array_equal(*drawn)


def test_death_before_the_folder_is_named_leaves_none(again: list[str], run: Path, tmp_path: Path) -> None:
    died = ppcl_process("*/quantized", *again, *INT4, python=DIE_AT_RENAME)
    assert died.returncode == 9, died.stderr
    assert not (tmp_path / "few" / "quantized").exists()
    succeed(*again, *INT4)
    # Not their bytes: safetensors writes a file's metadata in any order.
    found, whole = (load(folder / "quantized").transformer for folder in (tmp_path / "few", run))
    assert_same_tensors(parts(found), parts(whole))
    assert not [path for path in (tmp_path / "few").iterdir() if path.name.endswith(".tmp")]


def test_other_plugs_than_it_was_made_from_are_noticed(again: list[str], tmp_path: Path) -> None:
    succeed(*again, "quantize=int8", "quantize.variant=ppcl-depth")
    for file in (tmp_path / "few" / "plugs").glob("*.1-2.*"):
        file.unlink()
    succeed(*again[:-1], "distill.steps=7", "distill.intervals=[transformer_blocks.1-2]", "stages=[depth]")
    outcome = ppcl(*again[:-1], "generate.variants=[ppcl-quantized]", "stages=[generate]")
    assert outcome.code == 2
    assert "was quantised from another ppcl-depth" in outcome.err, outcome.err


def test_groups_that_divide_some_layers_leave_the_others(again: list[str], tmp_path: Path) -> None:
    outcome = succeed(*again, "quantize=int4", "quantize.group_size=128", "quantize.rounding=nearest")
    assert "group_size=128 does not divide" in outcome.out
    names = quantized_names(load(tmp_path / "few" / "quantized").transformer)
    assert names
    assert all(name.endswith("mlp.net.2") for name in names)  # 256 wide


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["stages=[quantize]"], ["'stages=[quantize]' needs a scheme", "quantize=int4"]),
        (["quantize.scheme=int3"], ["quantize.scheme=int3", "int8, int4, nf4"]),
        (["quantize=int4", "quantize.rounding=up"], ["quantize.rounding=up", "least_squares"]),
        (["quantize=int4", "quantize.group_size=null"], ["quantize.group_size=None", "64"]),
        (["quantize=int8", "quantize.group_size=64"], ["quantize.group_size=64", "quantize.scheme=int8"]),
        (["quantize=nf4", "quantize.rounding=least_squares"], ["quantize.rounding=least_squares", "nf4"]),
        (["quantize=int4", "quantize.num_batches=0"], ["quantize.num_batches=0", "at least 1"]),
        (["quantize=int4", "quantize.variant=mine"], ["quantize.variant=mine", "ppcl-depth"]),
        (["quantize=int4", "quantize.group_size=96"], ["quantize.group_size=96", "their widths are 64, 256"]),
        (["quantize=int4", "quantize.skip=['*']"], ["quantize.skip", "it leaves none"]),
        (["quantize=int3"], ["quantize=int3 is unknown", "int4"]),
        (["stages=[generate]", "generate.variants=[ppcl-quantized]"], ["ppcl.json does not exist: add quantize"]),
    ],
    ids=lambda value: " ".join(value) if "=" in str(value[0]) else "",
)
def test_mistakes_are_one_sentence_and_write_nothing(
    again: list[str], tmp_path: Path, options: list[str], fragments: list[str]
) -> None:
    outcome = ppcl(*again, *options)
    assert outcome.code == 2, outcome.out
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert [part for part in fragments if part not in outcome.err] == [], outcome.err
    assert not (tmp_path / "few" / "quantized").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_nf4_without_a_gpu_writes_nothing(again: list[str], tmp_path: Path) -> None:
    outcome = ppcl(*again, "quantize=nf4")
    assert outcome.code == 2
    assert "quantize.scheme=nf4 needs a CUDA GPU" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not (tmp_path / "few" / "quantized").exists()


def test_without_torchao_it_is_said(
    again: list[str], command: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    outcome = ppcl(*again, *INT4)
    assert outcome.code == 2
    assert "quantize.scheme=int4 needs torchao: pip install" in outcome.err
    assert not (tmp_path / "few" / "quantized").exists()
    outcome = ppcl(*command, VARIANTS, "stages=[generate]")
    assert outcome.code == 2
    assert "variant ppcl-quantized" in outcome.err
    assert "needs torchao" in outcome.err
