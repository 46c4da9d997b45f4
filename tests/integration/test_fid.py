"""`benchmark=fid` goes through drawing, scores, report and comparison, and says that lower is better."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from commands import INTERVALS, ppcl, succeed

from ppcl.families.dit.tiny import build_pipeline

QUICK = ["trainer=cpu", "trainer.num_threads=1", "trainer.progress=false", "logger=none", "benchmark.latency_repeats=1"]
QUICK += ["model.sampling.num_inference_steps=2", "benchmark=fid", "benchmark.settings.num_images=6"]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("fid")
    build_pipeline(0, 6).save_pretrained(folder / "dit")
    return ["model=auto", f"model.path={folder / 'dit'}", f"paths.runs_dir={folder / 'runs'}", INTERVALS, *QUICK]


def test_a_distance_is_scored_reported_and_compared(command: list[str], tmp_path: Path) -> None:
    drawing = [*command, "stages=[generate,evaluate,report]", "generate.variants=[teacher,removed]"]
    outcome = succeed(*drawing, "name=first")
    assert "score: Fréchet distance of the pictures from reference pictures, lower is better" in outcome.out
    assert "reused" in succeed(*drawing, "name=first").out
    run = Path(next(part for part in command if part.startswith("paths.runs_dir=")).partition("=")[2]) / "first"
    (report,) = run.glob("report/fid/report.json")
    rows = {row["name"]: row for row in json.loads(report.read_text())["variants"]}
    best, other = (rows[name]["scores"]["overall"] for name in ("teacher", "removed"))
    assert best > 0
    assert rows["removed"]["drop_percent"] == pytest.approx(100 * (other - best) / best)
    prompts = [
        json.loads(line)["prompt"] for line in (run / "images/fid/teacher/prompts.jsonl").read_text().splitlines()
    ]
    assert sorted(len(prompt.split()) for prompt in prompts) == [2, 2, 2, 3, 3, 3]  # "a cross", "a red cross"
    succeed(*drawing, "name=second", "benchmark.settings.num_images=4")
    succeed("compare", str(run), str(run.with_name("second")), f"to={tmp_path}")
    compared, _ = csv.DictReader((tmp_path / "comparison.csv").open())
    assert float(compared["score"]) == pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["benchmark.settings.num_images=1"], "benchmark.settings.num_images=1 is too few"),
        (["model.builder=null", "model.path=null", "model=dit_xl"], "need weights"),
        (["benchmark.settings.images=6"], "benchmark.settings.images is not a setting here"),
    ],
)
def test_settings_that_do_not_go_are_refused(command: list[str], settings: list[str], said: str) -> None:
    outcome = ppcl(*command, "name=refused", "stages=[generate]", "generate.variants=[teacher]", *settings)
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
