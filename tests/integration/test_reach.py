"""A budget that cannot be reached is refused when the intervals are known, and the sentence says what can be."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import INTERVALS, ppcl, succeed

SMALL = ["width.steps=0", "width.num_batches=1", "budget.num_batches=1"]


@pytest.fixture
def command(settings: list[str], tmp_path: Path) -> list[str]:
    return [*settings, f"paths.runs_dir={tmp_path}", "name=reach", "width.text_threshold=1e-9", *SMALL]


def least(sentence: str) -> float:
    found = re.search(r"(\d\.\d+) of the teacher's parameters are left .*Raise it to (\d\.\d+),", sentence)
    assert found, sentence
    assert found[1] == found[2]
    return float(found[1])


@pytest.mark.parametrize("width", [[], ["width=auto", "width.text_threshold=1e-9", "width.num_ffn=2"]])
def test_before_training_with_the_least_that_the_plan_can_then_serve(
    command: list[str], tmp_path: Path, width: list[str]
) -> None:
    ask = [*command, INTERVALS, *width, "stages=[depth,width,plan]" if width else "stages=[depth,plan]"]
    outcome = ppcl(*ask, "budget.params=0.1")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "reach" / "plugs").exists()
    found = least(outcome.err)
    succeed(*ask, f"budget.params={found}")  # as the sentence says
    choice = json.loads((tmp_path / "reach" / "plan" / "choice.json").read_text())
    assert choice["params_ratio"] == pytest.approx(found, abs=1e-3)
    assert choice["params_ratio"] <= found


def test_a_detection_that_is_too_small_is_kept(command: list[str], tmp_path: Path) -> None:
    outcome = ppcl(*command, "stages=[probe,detect,depth]", "budget.params=0.01")
    assert outcome.code == 2
    assert "add width=auto, or use more or longer intervals" in outcome.err
    assert (tmp_path / "reach" / "plan" / "plan.json").exists()
    assert not (tmp_path / "reach" / "plugs").exists()
    outcome = ppcl(*command, "stages=[probe,detect,depth]", "budget.params=0.01")  # and found again
    assert outcome.code == 2
    assert "detect  reused" in outcome.out
    succeed(*command, "stages=[detect]", f"budget.params={least(outcome.err)}")


def test_more_ffns_than_blocks_are_all_of_them(command: list[str], tmp_path: Path) -> None:
    """`width.num_ffn` is a limit."""
    succeed(*command, INTERVALS, "width=auto", "width.num_ffn=99", "width.num_text=0", "stages=[depth,width]")
    plan = json.loads((tmp_path / "reach" / "plan" / "width.json").read_text())
    assert plan["width"] == {"transformer_blocks": {"text": [], "ffn": [0, 1, 3, 5]}}


def test_a_given_width_set_of_a_block_that_detection_removes_is_named(command: list[str], tmp_path: Path) -> None:
    given = ["width.source=given", "width.transformer_blocks.ffn=[0,1,2,3,4,5]"]
    outcome = ppcl(*command, *given, "stages=[probe,detect,depth,width]", "budget.params=0.9")
    assert outcome.code == 2
    assert "width.transformer_blocks.ffn: block" in outcome.err
    assert "not among the blocks that the intervals keep" in outcome.err
    assert (tmp_path / "reach" / "plan" / "plan.json").exists()
    assert not (tmp_path / "reach" / "plugs").exists()
