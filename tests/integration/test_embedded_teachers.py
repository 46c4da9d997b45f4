"""The teachers that are shipped draw what they are told, as their files in the package are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from commands import succeed

from ppcl.paths import ASSETS

CONF = Path(__file__).parents[2] / "conf" / "model"
FOLDERS = [path for path in ASSETS.iterdir() if path.is_dir()]
MODELS = {path.stem: yaml.safe_load(path.read_text())["path"] for path in sorted(CONF.glob("tiny_*.yaml"))}


def test_every_one_is_offered_and_small():
    assert {f"embedded:{folder.name}" for folder in FOLDERS} == set(MODELS.values())
    for folder in FOLDERS:
        assert sum(file.stat().st_size for file in folder.rglob("*")) <= 8e6, folder


@pytest.mark.parametrize("model", MODELS)
def test_it_draws_most_prompts_right(model, tmp_path):
    few = ["benchmark.prompts_per_category=3", "benchmark.latency_repeats=1", "generate.variants=[teacher]"]
    where = [f"paths.runs_dir={tmp_path}", "name=drawn", "logger=none", "trainer=cpu", "trainer.num_threads=1"]
    succeed(f"model={model}", *few, *where, "stages=[generate,evaluate]")
    scores = json.loads((tmp_path / "drawn" / "scores" / "teacher.json").read_text())
    assert scores["scores"]["overall"] > 0.6
