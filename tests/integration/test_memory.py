"""The memory plan against the live bytes of real trainings, and what a command does with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import INTERVALS, PLUG_NAMES, digests, ppcl, succeed

from ppcl.command import prepare
from ppcl.errors import UsageError
from ppcl.memory.plan import STAGES, Plan, in_memory

# Near the last block: the teacher's weights behind the last one that is needed are not touched in a step.
SETS = ["intervals.transformer_blocks=[[2,4],[6,8],[17,18]]", "width.source=given"]
SETS += ["width.names=[transformer_blocks.19.text,transformer_blocks.5.ffn]"]
PAPER = ["model=qwen_image", "intervals=qwen_image_paper", "width=qwen_image_paper"]


@pytest.mark.parametrize("size", [4, 16])
def test_a_training_holds_as_much_as_is_planned(tmp_path: Path, size: int) -> None:
    command = ["model=tiny_qwen_image", *SETS, f"paths.runs_dir={tmp_path}", "name=fit", "logger=none"]
    command += [f"{group}.steps=4" for group in ("distill", "width", "finetune")]
    command += [f"distill.batch_size={size}", f"finetune.batch_size={size}"]
    lora = ["name=lora", f"paths.base_run={tmp_path / 'fit'}", "finetune.lora_rank=4"]
    for stages, changes in ((("depth", "width", "finetune"), []), (("finetune",), lora)):
        asked = [*command, *changes, f"stages=[{','.join(stages)}]"]
        succeed(*asked)
        run = prepare(asked)
        for stage in stages:
            need = STAGES[stage](Plan(run))
            need.device.pop("normal equations", None)  # they are gone when steps begin
            held = json.loads((run.folder / "training" / f"{stage}.json").read_text())["peak_memory_mb"]
            assert need.total / 1e6 == pytest.approx(held, rel=0.15), (stage, changes)


def test_students_that_train_in_groups_are_the_same(settings: list[str], trained: Path, tmp_path: Path) -> None:
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=grouped", "stages=[depth]", "distill.groups=2"]
    outcome = succeed(*command)
    assert "group 2 of 2: transformer_blocks.3-4" in outcome.out
    one, other = (digests(folder / "plugs") for folder in (tmp_path / "grouped", trained))
    assert {name for name in one if name.endswith(".safetensors")} == {f"{name}.safetensors" for name in PLUG_NAMES}
    assert {name: one[name] for name in one if name.endswith("safetensors")} == {
        name: other[name] for name in other if name.endswith("safetensors")
    }
    cost = json.loads((tmp_path / "grouped" / "training" / "depth.json").read_text())
    alone = json.loads((trained / "training" / "depth.json").read_text())
    assert cost["steps"] == 2 * alone["steps"]
    assert cost["peak_memory_mb"] < alone["peak_memory_mb"]
    assert "reused" in succeed(*command).out


def test_as_many_groups_as_fit(tmp_path: Path) -> None:
    groups = {}
    for memory in (400, 80, 48, 24):
        streamed = [f"model.streaming={str(memory < 80).lower()}"]
        command = [*PAPER, "stages=[depth]", "explain=true", "distill.groups=auto", f"trainer.memory_gb={memory}"]
        plan = Plan(prepare([*command, *streamed]))
        groups[memory] = plan.groups()
        assert plan.depth().total < memory * 1e9
    assert groups[400] == 1
    assert 1 < groups[80] < groups[24] < 13


def test_explain_shows_and_leaves_nothing(tmp_path: Path) -> None:
    stages = "stages=[depth,width,finetune,generate]"
    outcome = succeed(*PAPER, stages, "explain=true", "trainer.memory_gb=85", f"paths.runs_dir={tmp_path}")
    for word in ("teacher 40.86 GB", "(too much)", "hours", "the device has 85.00 GB"):
        assert word in outcome.out
    assert not [*tmp_path.iterdir()]


def test_what_does_not_fit_is_refused_before_anything_loads(tmp_path: Path) -> None:
    drawing = ["model=qwen_image", "model.path=NAME/NONE", "stages=[generate]", "generate.variants=[teacher]"]
    outcome = ppcl(*drawing, "generate.prompt=x", "trainer.memory_gb=24", f"paths.runs_dir={tmp_path}")
    assert outcome.code == 2
    assert "'stages=[generate]' needs about" in outcome.err
    assert "generate.offload=model" in outcome.err
    assert not [*tmp_path.iterdir()]


def test_a_lack_of_memory_names_what_to_turn() -> None:
    run = prepare(["model=tiny_qwen_image", "stages=[probe]"])
    with pytest.raises(UsageError, match=r"ran out of memory on cpu: turn probe\.num_batches"), in_memory(run, "probe"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    with pytest.raises(RuntimeError, match="a bug"), in_memory(run, "probe"):
        raise RuntimeError("a bug")


@pytest.mark.parametrize("model", ["qwen_image_edit_2509", "flux_dev", "dit_xl"])
def test_every_model_is_estimated_without_weights(model: str, tmp_path: Path) -> None:
    stages = "stages=[cache,probe,depth,width,finetune,generate,evaluate]"
    outcome = succeed(f"model={model}", stages, "width=auto", "explain=true", f"paths.runs_dir={tmp_path}")
    assert "one of three blocks in every five is assumed" in outcome.out
    assert outcome.out.count("teacher ") >= 4
