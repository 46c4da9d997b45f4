"""Fine-tuning on recorded velocities: the same result without the teacher in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import INTERVALS, digests, ppcl, succeed

TUNE = ["stages=[finetune]", "finetune=tiny", "finetune.steps=20", "finetune.batch_size=4", "finetune.accumulate=2"]
RECORDED = ["finetune.recorded=true", "finetune.feature_weight=0"]


@pytest.mark.parametrize("extra", [[], ["finetune.lora_rank=2", "finetune.optimizer=adamw"]])
def test_recorded_velocities_train_the_same_model(
    settings: list[str], trained: Path, tmp_path: Path, extra: list[str]
) -> None:
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", f"paths.base_run={trained}", *TUNE, *extra]
    succeed(*command, "name=plain", "finetune.feature_weight=0")
    outcome = succeed(*command, "name=recorded", *RECORDED)
    assert "for the teacher's velocities" in outcome.out
    found = {name: digests(tmp_path / name / "finetuned" / "transformer") for name in ("plain", "recorded")}
    assert found["recorded"] == found["plain"]
    costs = {name: json.loads((tmp_path / name / "training" / "finetune.json").read_text()) for name in found}
    assert costs["recorded"]["peak_memory_mb"] < 0.95 * costs["plain"]["peak_memory_mb"]
    # Written once: another training with the same teacher and data reads them, also of a streamed teacher.
    again = succeed(*command, "name=again", *RECORDED, "finetune.warmup_steps=2", "model.streaming=true")
    assert "for the teacher's velocities" not in again.out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("finetune.feature_weight=1", ["finetune.recorded=true", "add finetune.feature_weight=0"]),
        ("finetune.accumulate=3", ["finetune.accumulate=3", "choose one of 1, 2, 4"]),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings: list[str], trained: Path, change: str, words: list[str]) -> None:
    outcome = ppcl(*settings, INTERVALS, f"paths.base_run={trained}", *TUNE, *RECORDED, change)
    assert outcome.code == 2
    assert all(word in outcome.err for word in words)
