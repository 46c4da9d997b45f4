"""A traced model on two processes, with some weights in float32 in blocks of bfloat16, as diffusers loads Wan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import launch, succeed
from safetensors.torch import load_file

from ppcl.artifacts.plugs import load_plugs
from tests.pipelines_tiny import wan
from tests.pipelines_tiny.chain import SHORT

PROMPTS = ["a red circle", "a blue square", "a cat", "a dog"]


def dtypes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Every setting but the stages. What the prompts show is recorded, and the intervals are detected."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    paths = [f"model.path={wan.build(folder / 'teacher')}", f"data.path={folder / 'prompts.txt'}"]
    small = ["method.min_cka=0", "finetune.steps=2", "finetune.batch_size=4", "model.dtype=bfloat16"]
    found = ["model=auto", *paths, *SHORT, *wan.SETTINGS, *small, f"paths.runs_dir={folder}"]
    succeed(*found, "name=one", "stages=[cache,probe,detect,depth,finetune]")
    return found


def test_a_sharded_teacher_trains_what_one_process_does(command: list[str]) -> None:
    out = launch(2, *command, "name=two", "strategy=fsdp", "stages=[detect,depth,finetune]")
    assert out.count("wrote 2 plugs") == 1
    assert "held-out velocity error" in out
    runs = Path(command[-1].partition("=")[2])
    expected, found = (load_plugs(runs / name / "plugs") for name in ("one", "two"))
    assert found.keys() == expected.keys()
    for name, plug in expected.items():
        assert found[name].losses == pytest.approx(plug.losses, rel=0.02)  # in bfloat16
        assert dtypes(found[name].state_dict) == dtypes(plug.state_dict)
    file = "finetuned/transformer/diffusion_pytorch_model.safetensors"
    whole = [dtypes(load_file(runs / name / file)) for name in ("one", "two")]
    assert whole[0] == whole[1]
    assert {*whole[0].values()} == {torch.bfloat16, torch.float32}
