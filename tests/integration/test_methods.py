"""Every method that removes blocks chooses some of each shipped teacher, and a command saves what it chose by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import succeed

from ppcl.command import prepare
from ppcl.config import MethodConfig
from ppcl.data.batches import TrainingBatch
from ppcl.methods.base import Teacher
from ppcl.methods.registry import load_method, method_names
from ppcl.surgery.count import count_parameters
from ppcl.validation.pruning import check_intervals

SHARE = 0.75
# What each method saves its scores by; those that go by the blocks' places have none.
SCORES = {
    "amber": {"cluster_cosine"},
    "bk_sdm": set(),
    "cka_sensitivity": {"cka_without"},
    "flux_lite": {"mse"},
    "greedy": {"velocity_error"},
    "hierarchical_prune": {"weighted_velocity_error"},
    "llm_streamline": {"window_cosine"},
    "random": set(),
    "replace_me": {"window_cosine"},
    "shortgpt": {"block_influence"},
    "uniform": set(),
}


def test_all_methods_with_a_size_are_tried_here() -> None:
    assert {*method_names()} == {*SCORES, "indices", "lp", "lp_a", "lp_b", "tinyfusion"}  # the last one trains


@pytest.mark.parametrize("model", ["tiny_qwen_image", "tiny_qwen_image_edit", "tiny_flux", "tiny_dit"])
def test_every_method_makes_a_teacher_small_enough(model: str) -> None:
    run = prepare([f"model={model}", "stages=[detect]", "method=shortgpt", "trainer=cpu"])
    stream = run.data.stream(run.config.data.calibration_seed, 1)

    def calibration() -> Iterator[TrainingBatch]:
        yield run.data.to_device(next(iter(stream.calibration(1, 1))))

    teacher = Teacher(run.family, run.teacher.transformer, calibration, lambda: pytest.fail("no probes"))
    chosen = []
    for rule, scores in SCORES.items():
        method = load_method(MethodConfig(rule=rule, params=SHARE))
        found = method.detect(teacher)
        check_intervals(found.intervals, run.num_layers, rule, run.family.facts.first_block)
        counts = count_parameters(run.family, run.config.model.arch, found.intervals)
        assert 0.6 < counts["student"] / counts["teacher"] <= SHARE, rule
        assert {*found.scores} == scores, rule
        chosen.append(str(found.intervals))
    assert len({*chosen}) > 5  # most methods choose differently


def test_a_command_saves_the_plan_and_reuses_it(settings: list[str], tmp_path: Path) -> None:
    command = [*settings, "name=short", "stages=[detect,plan]", "method=shortgpt", f"paths.runs_dir={tmp_path}"]
    assert "wrote" in succeed(*command).out
    plan = json.loads((tmp_path / "short" / "plan" / "plan.json").read_text(encoding="utf-8"))
    assert plan["parameters"]["student"] <= 0.7 * plan["parameters"]["teacher"]
    assert [*plan["scores"]["block_influence"]] == [f"transformer_blocks.{index}" for index in range(6)]
    assert plan["made_from"]["method"]["params"] == 0.7
    assert "reused" in succeed(*command).out


def test_greedy_prints_what_it_removes_and_counts_its_forwards(settings: list[str], tmp_path: Path) -> None:
    """Five of six blocks may go, and two go, which are measured on at most three batches."""
    command = [*settings, "name=greedy", "stages=[detect]", "method=greedy", f"paths.runs_dir={tmp_path}"]
    command += ["method.params=null", "method.num_remove=2", "method.num_samples=12", "method.settings.batches=3"]
    out = succeed(*command).out
    plan = json.loads((tmp_path / "greedy" / "plan" / "plan.json").read_text(encoding="utf-8"))
    errors = plan["scores"]["velocity_error"]
    assert len(errors) == 2
    lines = [line for line in out.splitlines() if "removed transformer_blocks" in line]
    assert [line.split("  ")[-1] for line in lines] == [
        f"removed {name}: velocity error {error:.4g}" for name, error in errors.items()
    ]
    forwards = int(out.split(" forwards, of 27 that")[0].split()[-1])
    assert 5 + 2 + 4 + 2 <= forwards <= 27
    assert "reused" in succeed(*command).out
