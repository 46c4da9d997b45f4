"""A streamed teacher gives what a resident one gives, bit for bit, through every stage that may stream."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import INTERVALS, succeed
from safetensors.torch import load_file

from ppcl.artifacts.costs import Costs
from ppcl.artifacts.files import read_json
from ppcl.command import prepare
from ppcl.variants.costs import Meter
from ppcl.variants.plugs import required_plugs
from ppcl.variants.switch import Switch

PARTS = "distill.accumulate=2"  # which pass a streamed block together
WIDTH = ["width.source=given", "width.transformer_blocks={text:[5],ffn:[0,3]}", "width.steps=3"]
TUNING = ["finetune=tiny", "finetune.steps=3", "finetune.batch_size=4"]


LORA = ["finetune.lora_rank=2", "finetune.optimizer=adamw", "finetune.ema_decay=0.5", "finetune.feature_weight=1"]


def tensors(runs: Path) -> dict[str, dict]:
    """Every safetensors file below a folder but checkpoints, by its path."""
    return {str(path.relative_to(runs)): load_file(path) for path in sorted(runs.rglob("*.safetensors"))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_stage_is_bit_equal(settings: list[str], tmp_path: Path, dtype: str) -> None:
    for name, streaming in (("resident", "false"), ("streamed", "true")):
        command = [*settings, *TUNING, f"paths.runs_dir={tmp_path / name}", "name=run", f"model.streaming={streaming}"]
        command.append(f"model.dtype={dtype}")
        succeed(*command, "stages=[probe,detect]")
        succeed(*command, INTERVALS, *WIDTH, PARTS, "stages=[depth,width,finetune]")
        succeed(*command, INTERVALS, "stages=[boundaries]")
    found, expected = tensors(tmp_path / "streamed"), tensors(tmp_path / "resident")
    assert found.keys() == expected.keys()
    assert any("boundaries" in name for name in found)
    left = [content for name, content in found.items() if "/plugs/" in name or "/finetuned/" in name]
    assert {str(value.dtype) for content in left for value in content.values()} == {f"torch.{dtype}"}
    for name, content in expected.items():
        assert content.keys() == found[name].keys()
        assert all((found[name][key] == value).all() for key, value in content.items()), name


def test_a_lora_is_tuned_while_all_frozen_blocks_are_streamed(settings: list[str], tmp_path: Path) -> None:
    """Forward and backward, and again as the result is written."""
    found, dtype = {}, "bfloat16"
    for name, streaming in (("resident", "false"), ("streamed", "true")):
        command = [*settings, *TUNING, *LORA, INTERVALS, *WIDTH, f"paths.runs_dir={tmp_path}", f"model.dtype={dtype}"]
        if name == "resident":
            succeed(*command, "name=plugs", "stages=[depth,width]")
        command += [f"paths.base_run={tmp_path / 'plugs'}", f"name={name}", f"model.streaming={streaming}"]
        succeed(*command, "stages=[finetune]")
        files = (tmp_path / name / "finetuned" / "transformer").glob("*.safetensors")
        found[name] = {key: value for file in files for key, value in load_file(file).items()}
        found[name] |= load_file(tmp_path / name / "finetuned" / "pytorch_lora_weights.safetensors")
    assert found["streamed"].keys() == found["resident"].keys()
    assert {str(value.dtype) for key, value in found["streamed"].items() if "lora" not in key} == {f"torch.{dtype}"}
    for key, value in found["resident"].items():
        assert (found["streamed"][key] == value).all(), key


def test_plugs_are_measured_and_chosen_while_the_teacher_is_streamed(settings: list[str], tmp_path: Path) -> None:
    """Students, projectors that share a streamed block's weights, and both in one block."""
    common = [*settings, INTERVALS, *WIDTH, PARTS, "budget.num_batches=2", f"paths.runs_dir={tmp_path}"]
    succeed(*common, "name=plugs", "stages=[depth,width]")
    found = {}
    for name, streaming in (("resident", "false"), ("streamed", "true")):
        command = [*common, f"paths.base_run={tmp_path / 'plugs'}", f"name={name}", f"model.streaming={streaming}"]
        said = succeed(*command, "budget.params=0.7", "stages=[plan]").out
        assert "budget.params=0.7: " in said
        found[name] = (
            Costs.load(tmp_path / name / "plan" / "costs.json"),
            read_json(tmp_path / name / "plan" / "choice.json", "The choice"),
        )
    (streamed, chosen), (resident, expected) = found["streamed"], found["resident"]
    assert streamed.errors == resident.errors
    assert len(streamed.errors) > 8
    assert chosen["plugged"] == expected["plugged"]
    for one, other in zip(streamed.units, resident.units, strict=True):
        assert (one.name, one.needs, one.costs) == (other.name, other.needs, other.costs)
        assert one.savings["params"] == other.savings["params"]
        assert one.savings["memory_gb"] == other.savings["memory_gb"]
    assert streamed.teacher.memory_gb == pytest.approx(resident.teacher.memory_gb, rel=0.1)
    assert streamed.teacher.latency_ms > 0


def test_a_block_is_shared_after_it_was_timed_and_only_one_is_in_memory(settings: list[str], tmp_path: Path) -> None:
    """Blocks are timed in inference mode, where torch makes tensors that no parameter could be made of."""
    command = [*settings, INTERVALS, *WIDTH, "budget.num_batches=1", f"paths.runs_dir={tmp_path}", "name=run"]
    succeed(*command, "stages=[depth,width]")
    run = prepare([*command, "model.streaming=true", "stages=[plan]", "budget.params=0.8"])
    run.teacher.enter("plan")
    blocks = list(run.family.blocks(run.teacher.transformer).values())
    meter = Meter(run, Switch(run, required_plugs(run)).board)
    assert meter.teacher_ms > 0
    assert meter.error({"transformer_blocks.0.ffn"}) > 0
    assert meter.milliseconds_saved(set(), {"transformer_blocks.0.ffn"}, {("transformer_blocks", 0)})
    loaded = [block for block in blocks if any(any(weight.stride()) for weight in block.parameters())]
    assert len(loaded) == 1
