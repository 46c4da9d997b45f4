"""An export that is pruned in width: loaded with ppcl, with its own code alone, and saved again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import INTERVALS, NUM_LAYERS, digests, ppcl, succeed

import ppcl as package
from ppcl.artifacts.plugs import load_projectors
from ppcl.artifacts.tensors import read_tensors, write_tensors
from ppcl.errors import UsageError

PROMPTS = ["a red circle", "two squares", "a blue cross left of a circle"]
ARGUMENTS = {"height": 32, "width": 32, "num_inference_steps": 2, "true_cfg_scale": 3.0, "output_type": "np"}
# Of the kept 0, 1, 3, 5: a run of two behind student 1, whose FFN goes too, and a student without both.
TEXT, FFN = [3, 5], [1, 3]
SETS = ["width.transformer_blocks.text=[3,5]", "width.transformer_blocks.ffn=[1,3]"]
SHORT = ["width.steps=3", "width.num_batches=2"]
WIDTH = [INTERVALS, "width=qwen_image_paper", "width.keep_text_query=false", *SETS, *SHORT]

# What a user of the export runs. `prepare` comes first: an import of ppcl, or none to be had.
LOADER = """
import json, sys
folder, prompts, arguments, target, options = sys.argv[1], *map(json.loads, sys.argv[2:4]), *sys.argv[4:6]
{prepare}
import numpy, torch
from diffusers import DiffusionPipeline

def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompts, negative_prompt=[""] * len(prompts),
        generator=[torch.Generator().manual_seed(n) for n in range(len(prompts))], **arguments,
    ).images

facts = {{}}
{refused}
pipeline = DiffusionPipeline.from_pretrained(folder, **json.loads(options))
numpy.save(target, draw(pipeline))
transformer = pipeline.transformer
facts |= {{
    "class": type(transformer).__name__, "module": type(transformer).__module__,
    "blocks": len(transformer.transformer_blocks), "config": dict(transformer.config),
    "params": sum(p.numel() for p in transformer.parameters()),
}}
{again}
print(json.dumps(facts, default=str))
"""
REFUSED = """
try:
    DiffusionPipeline.from_pretrained(folder)
except Exception as error:
    facts["refusal"] = str(error)
"""
# Bit for bit the same with a cache that reuses nothing; then with one that skips all it may.
CACHED = """
from diffusers.hooks import FirstBlockCacheConfig
for name, threshold in (("none", 0), ("all", 1e6)):
    transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    numpy.save(target + f".{name}.npy", draw(pipeline))
    transformer.disable_cache()
"""
AGAIN = """
pipeline.save_pretrained(target + ".again")
numpy.save(target + ".again.npy", draw(DiffusionPipeline.from_pretrained(target + ".again")))
"""


def draw(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(number) for number in range(len(PROMPTS))]
    return pipeline(PROMPTS, negative_prompt=[""] * len(PROMPTS), generator=generators, **ARGUMENTS).images


def load(folder: Path, elsewhere: Path, options: dict[str, Any], **parts: str) -> tuple[dict[str, Any], np.ndarray]:
    """What a fresh process finds in `folder` and draws with it, started where no file of the repository helps."""
    target = elsewhere / "images.npy"
    program = LOADER.format(**({"prepare": "", "refused": "", "again": ""} | parts))
    arguments = [str(folder), json.dumps(PROMPTS), json.dumps(ARGUMENTS), str(target), json.dumps(options)]
    environment = os.environ | {"HF_MODULES_CACHE": str(elsewhere / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), np.load(target)


@pytest.fixture(scope="module")
def command(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*settings, *WIDTH, f"paths.runs_dir={tmp_path_factory.mktemp('width')}", "name=width"]


@pytest.fixture(scope="module")
def pruned(command: list[str]) -> Path:
    """The folder of a run that pruned depth and width. Read it, do not write."""
    succeed(*command, "stages=[depth,width,export]")
    runs = next(a for a in command if a.startswith("paths.runs_dir=")).partition("=")[2]
    return Path(runs) / "width"


@pytest.fixture(scope="module")
def plugged(teacher: Path, pruned: Path) -> np.ndarray:
    """Pictures of the teacher with every plug of the run in it; its own differ."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(teacher)
    whole = draw(pipeline)
    board = package.plug(pipeline, pruned / "plugs")
    assert board.width == {"transformer_blocks": {"text": TEXT, "ffn": FFN}}
    images = draw(pipeline)
    board("transformer_blocks.1-2", "transformer_blocks.3-4")
    assert not np.array_equal(draw(pipeline), images)
    board()
    assert np.array_equal(draw(pipeline), whole)
    assert not np.array_equal(images, whole)
    return images


def as_teacher(command: list[str], folder: Path, *arguments: str) -> list[str]:
    """The command with the pipeline in `folder` for its teacher, and no width sets."""
    ours = ("model.path", "width", "name=", "intervals")
    return [*(a for a in command if not a.startswith(ours)), f"model.path={folder}", "name=again", *arguments]


@pytest.mark.parametrize(
    "stage", ["probe", "detect", "boundaries", "depth", "width", "plan", "finetune", "export", "quantize"]
)
def test_it_is_not_pruned_again_and_the_sentence_says_what_is(
    command: list[str], pruned: Path, teacher: Path, stage: str
) -> None:
    extra = {"width": ["width=auto"], "quantize": ["quantize=int8"]}.get(stage, [])
    outcome = ppcl(*as_teacher(command, pruned / "export", f"stages=[{stage}]", *extra))
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert f"'stages=[{stage}]' cannot prune model.path={pruned / 'export'}" in outcome.err
    assert "PrunedQwenImageTransformer2DModel" in outcome.err
    advised = outcome.err.partition("set model.path to its teacher, ")[2].partition(",")[0]
    assert advised == teacher.name  # an export does not say where on a machine its teacher lies
    assert not (pruned.parent / "again").exists()


def test_it_is_drawn_and_scored_like_any_model(command: list[str], pruned: Path, tmp_path: Path) -> None:
    runs = [f"paths.runs_dir={tmp_path}", "generate.variants=[teacher]", "stages=[generate,evaluate]"]
    succeed(*as_teacher(command, pruned / "export", *runs))
    scores = json.loads((tmp_path / "again" / "scores" / "teacher.json").read_text())
    weights, _ = read_tensors(pruned / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert scores["params"] == sum(value.numel() for value in weights.values())


def test_an_export_pruned_in_depth_alone_is_pruned_again(command: list[str], pruned: Path, tmp_path: Path) -> None:
    """With blocks counted in the model that is given, and parameters that are those of what comes out."""
    runs = [f"paths.runs_dir={tmp_path}", f"paths.base_run={pruned}", INTERVALS, "width=none", "stages=[export]"]
    succeed(*(a for a in command if not a.startswith("width")), *runs, "export.variant=ppcl-depth")
    first = tmp_path / "width" / "export"
    again = ["intervals.transformer_blocks=[[1,2]]", f"paths.runs_dir={tmp_path}", "stages=[plan,depth,export]"]
    succeed(*as_teacher(command, first, *again))
    plan = json.loads((tmp_path / "again" / "plan" / "plan.json").read_text())
    assert plan["num_layers"] == {"transformer_blocks": 4}
    sizes = []
    for folder in (first, tmp_path / "again" / "export"):
        weights, _ = read_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        sizes.append(sum(value.numel() for value in weights.values()))
        assert json.loads((folder / "transformer" / "config.json").read_text())["num_layers"] in (3, 4)
    assert sizes == [plan["parameters"]["teacher"], plan["parameters"]["student"]]


def test_with_ppcl_no_flag_is_needed_and_it_can_be_saved_again(
    pruned: Path, plugged: np.ndarray, tmp_path: Path
) -> None:
    facts, images = load(pruned / "export", tmp_path, {}, prepare="import ppcl", again=AGAIN)
    assert np.array_equal(images, plugged)
    assert np.array_equal(np.load(tmp_path / "images.npy.again.npy"), plugged)
    assert facts["class"] == "PrunedQwenImageTransformer2DModel"
    plan = json.loads((pruned / "plan" / "width.json").read_text())
    assert facts["params"] == plan["parameters"]["student"]
    assert facts["blocks"] == facts["config"]["num_layers"] == NUM_LAYERS - 2
    kept = facts["config"]["ppcl"]["kept_layers"]["transformer_blocks"]
    assert [kept[position] for position in facts["config"]["pruned_text"]] == TEXT
    assert [kept[position] for position in facts["config"]["pruned_ffn"]] == FFN
    assert facts["config"]["ppcl"]["width"] == {"transformer_blocks": {"text": TEXT, "ffn": FFN}}


def test_without_ppcl_its_own_code_draws_the_same_and_only_with_the_flag(
    pruned: Path, plugged: np.ndarray, tmp_path: Path
) -> None:
    facts, images = load(
        pruned / "export",
        tmp_path,
        {"trust_remote_code": True},
        prepare="sys.modules['ppcl'] = None",
        refused=REFUSED,
        again=CACHED,
    )
    assert np.array_equal(images, plugged)
    reused = {name: np.load(tmp_path / f"images.npy.{name}.npy") for name in ("none", "all")}
    assert np.array_equal(reused["none"], plugged)
    assert not np.array_equal(reused["all"], plugged)
    assert facts["class"] == "PrunedQwenImageTransformer2DModel"
    assert facts["module"].startswith("diffusers_modules.")
    assert "trust_remote_code" in facts["refusal"]


def test_code_lies_beside_the_weights_it_is_for(pruned: Path) -> None:
    index = json.loads((pruned / "export" / "model_index.json").read_text())
    assert index["transformer"] == ["transformer_qwen_image_pruned", "PrunedQwenImageTransformer2DModel"]
    copied = (pruned / "export" / "transformer" / "transformer_qwen_image_pruned.py").read_text(encoding="utf-8")
    assert "class PrunedQwenImageTransformer2DModel(" in copied
    assert "class ResidualLinear(" in copied  # which it imports where ppcl is installed
    assert "\nfrom ppcl" not in copied
    card = (pruned / "export" / "README.md").read_text(encoding="utf-8")
    assert "trust_remote_code=True" in card


@pytest.mark.parametrize("gone", ["transformer_blocks.5.text", "transformer_blocks.3.ffn"])
def test_a_projector_that_is_lost_is_trained_again_to_the_same_bits(
    command: list[str], pruned: Path, tmp_path: Path, gone: str
) -> None:
    shutil.copytree(pruned, tmp_path / "width")
    before = digests(pruned / "plugs")
    for suffix in ("json", "safetensors"):
        (tmp_path / "width" / "plugs" / f"{gone}.{suffix}").unlink()
    succeed(*command, f"paths.runs_dir={tmp_path}", "stages=[width]")
    assert digests(tmp_path / "width" / "plugs") == before


def test_a_projector_with_a_nan_is_refused_by_its_file(command: list[str], pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned, tmp_path / "width")
    file = tmp_path / "width" / "plugs" / "transformer_blocks.3.text.safetensors"
    tensors, metadata = read_tensors(file)
    tensors["txt_proj.weight"][0, 0] = float("nan")
    write_tensors(file, tensors, metadata)
    with pytest.raises(UsageError, match=rf"{file}: txt_proj\.weight holds values that are not finite"):
        load_projectors(file.parent)
    outcome = ppcl(*command, f"paths.runs_dir={tmp_path}", "stages=[export]")
    assert outcome.code == 2
    assert str(file) in outcome.err.replace("\n", "")
    assert "Traceback" not in outcome.err


def test_sets_may_be_given_without_a_file(settings: list[str], pruned: Path, tmp_path: Path) -> None:
    """As the message on missing sets says: width.transformer_blocks.text=[...] or .ffn=[...]."""
    shutil.copytree(pruned, tmp_path / "width")
    rest = [f"paths.runs_dir={tmp_path}", "name=width", "stages=[width]"]
    outcome = succeed(*settings, INTERVALS, "width.source=given", *SETS, *SHORT, *rest)
    assert "reused" in outcome.out
