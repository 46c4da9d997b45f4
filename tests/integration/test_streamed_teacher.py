"""A streamed teacher gives what a resident one gives, bit for bit, through every stage that may stream."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import INTERVALS, succeed
from safetensors.torch import load_file

WIDTH = ["width.source=given", "width.transformer_blocks={text:[5],ffn:[0,3]}", "width.steps=3"]
TUNING = ["finetune=tiny", "finetune.steps=3", "finetune.batch_size=4"]


def tensors(runs: Path) -> dict[str, dict]:
    """Every safetensors file below a folder but checkpoints, by its path."""
    return {str(path.relative_to(runs)): load_file(path) for path in sorted(runs.rglob("*.safetensors"))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_stage_is_bit_equal(settings: list[str], tmp_path: Path, dtype: str) -> None:
    for name, streaming in (("resident", "false"), ("streamed", "true")):
        command = [*settings, *TUNING, f"paths.runs_dir={tmp_path / name}", "name=run", f"model.streaming={streaming}"]
        command.append(f"model.dtype={dtype}")
        succeed(*command, "stages=[probe,detect]")
        succeed(*command, INTERVALS, *WIDTH, "stages=[depth,width,finetune]")
        succeed(*command, INTERVALS, "stages=[boundaries]")
    found, expected = tensors(tmp_path / "streamed"), tensors(tmp_path / "resident")
    assert found.keys() == expected.keys()
    assert any("boundaries" in name for name in found)
    left = [content for name, content in found.items() if "/plugs/" in name or "/finetuned/" in name]
    assert {str(value.dtype) for content in left for value in content.values()} == {f"torch.{dtype}"}
    for name, content in expected.items():
        assert content.keys() == found[name].keys()
        assert all((found[name][key] == value).all() for key, value in content.items()), name
