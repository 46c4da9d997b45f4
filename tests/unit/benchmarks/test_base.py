"""Benchmarks found by the name of their file, with settings of their own; and scores as they are kept."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import ppcl.benchmarks
from ppcl.artifacts.files import read_json
from ppcl.artifacts.headers import Header
from ppcl.artifacts.scores import ComparedRow, Fidelity, Likeness, NoiseLevel, ScoreRow, Scores
from ppcl.benchmarks.base import Prompt, benchmark_names, load_benchmark
from ppcl.benchmarks.shapes import Shapes
from ppcl.config import Config
from ppcl.errors import UsageError

SOURCE = """
from dataclasses import dataclass, field

from ppcl.artifacts.scores import Scores
from ppcl.benchmarks.base import Benchmark, Prompt


@dataclass(kw_only=True)
class Bright(Benchmark):
    threshold: float
    words: list[str] = field(default_factory=list)
    images_per_prompt: int = 3

    def prompts(self, family, config):
        return [Prompt(word) for word in self.words]

    def score(self, prompts, images):
        return Scores({}, 0.5)
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a module where benchmarks are looked for."""
    monkeypatch.setattr(ppcl.benchmarks, "__path__", [*ppcl.benchmarks.__path__, str(tmp_path)])

    def written(source):
        monkeypatch.delitem(sys.modules, "ppcl.benchmarks.bright", raising=False)
        (tmp_path / "bright.py").write_text(source)

    yield written
    sys.modules.pop("ppcl.benchmarks.bright", None)


def test_every_module_beside_base_is_one(write):
    shipped = benchmark_names()
    assert "shapes" in shipped
    assert "base" not in shipped
    write(SOURCE)
    assert set(benchmark_names()) - set(shipped) == {"bright"}
    assert isinstance(load_benchmark("shapes", {}), Shapes)


def test_listing_and_refusing_import_none():
    code = """
import sys
from ppcl.config import Config, ModelConfig
from ppcl.errors import UsageError
from ppcl.validation import check
config = Config(name="x", stages=["generate"], model=ModelConfig(name="x", family="auto"))
config.benchmark.name = "drawbench"
try:
    check(config)
except UsageError as error:
    print(error)
print(sorted({"torch", "scipy", "ppcl.benchmarks.shapes"} & set(sys.modules)))
from ppcl.benchmarks.base import load_benchmark
load_benchmark("shapes", {})
print("torch" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == [
        f"benchmark.name=drawbench is not one of {', '.join(benchmark_names())}.",
        "[]",
        "False",
    ]


def test_settings_are_its_fields(write):
    write(SOURCE)
    benchmark = load_benchmark("bright", {"threshold": 0.25, "words": ["x"]})
    expected = {"threshold": 0.25, "words": ["x"], "images_per_prompt": 3}
    assert benchmark.made_from == {"name": "bright", "settings": expected}
    assert [prompt.text for prompt in benchmark.prompts(None, Config())] == ["x"]
    assert benchmark.fulfils(Prompt("x"), Image.new("RGB", (2, 2))) is None


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        (
            {"treshold": 1.0},
            ["benchmark.settings.treshold", "is not a setting here; there are images_per_prompt"],
        ),
        ({"threshold": "high"}, ["benchmark.settings.threshold", "'high'"]),
        ({}, ["benchmark.settings.threshold", "mandatory"]),
        ({"threshold": 1, "images_per_prompt": 0}, ["benchmark.settings.images_per_prompt=0", "at least 1"]),
        ({"threshold": 1, "images_per_prompt": 1.5}, ["benchmark.settings.images_per_prompt", "1.5"]),
    ],
)
def test_settings_it_does_not_have_are_refused_in_a_sentence(write, settings, fragments):
    write(SOURCE)
    with pytest.raises(UsageError) as caught:
        load_benchmark("bright", settings)
    assert [part for part in fragments if part not in str(caught.value)] == [], caught.value
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "source", ["", SOURCE.replace("def score", "def scores"), SOURCE + SOURCE.replace("Bright", "Other")]
)
def test_a_module_declares_one(write, source):
    write(source)
    with pytest.raises(UsageError, match=r"bright.py must declare one Benchmark with prompts and score; it declares"):
        load_benchmark("bright", {"threshold": 1})


def test_given_pictures_are_told_apart_by_their_pixels():
    class Plain(Shapes):
        given = Shapes.__base__.given

    black, white = np.zeros((4, 4, 3), np.uint8), Image.new("RGB", (4, 4), "white")
    assert Plain().given([Prompt("a")], Config()) == {}
    one, other, both = (
        Plain().given([Prompt("a", references=pictures)], Config()) for pictures in ([black], [white], [black, white])
    )
    assert len({one["references"], other["references"], both["references"]}) == 3
    assert Plain().given([Prompt("b", references=[Image.fromarray(black)])], Config()) == one


def test_the_mean_of_categories_counts_those_without_one_as_another():
    scores = Scores.by_category(["a", "a", "b", None, None], [1, 0, 1, 0, 0])
    assert scores == Scores({"a": 0.5, "b": 1.0}, 0.5)
    assert Scores.by_category([None, None], [1, 0]).to_json() == {"overall": 0.5}


def test_an_interval_of_confidence_is_that_of_the_mean_of_categories():
    assert Scores.by_category(["a"] * 8, [1] * 8).interval == pytest.approx(1.96 * (0.9 * 0.1 / 10) ** 0.5)
    half = Scores.by_category(["a", "b"] * 8, [1] * 16).interval
    assert half == pytest.approx(1.96 * (2 * 0.9 * 0.1 / 10) ** 0.5 / 2)
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(4000, 10))
    found = [Scores.by_category(["a"] * 4 + ["b"] * 6, values) for values in drawn]
    assert np.mean([abs(scores.overall) < scores.interval for scores in found]) > 0.87
    assert Scores.by_category(["a", "a", "b"], [0.2, 0.4, 0.6]).interval is None  # one value has no spread
    assert "interval" not in Scores.by_category(["a"], [1]).to_json()


def row(name="teacher", overall=0.8, params=10):
    return ScoreRow(
        name=name,
        num_layers=6,
        params=params,
        latency_ms=1.5,
        peak_memory_mb=2.5,
        scores=Scores({"a": overall}, overall),
        students=["blocks.1-2"],
        projectors=[],
        removed=[],
    )


def test_a_row_is_read_as_it_was_written(tmp_path):
    path, header = tmp_path / "teacher.json", Header("ppcl.scores", {"images": "0"})
    row().save(path, header, {})
    assert ScoreRow.load(path) == row()
    content = read_json(path, "The scores")
    assert list(content)[:5] == ["format", "version", "fingerprint", "made_from", "name"]
    assert content["scores"] == {"a": 0.8, "overall": 0.8}
    damaged = [{k: v for k, v in content.items() if k != key} for key in ("scores", "params")]
    edits = {"params": "x", "latency_ms": 0, "students": None, "removed": [1], "velocity_error": "low"}
    damaged += [content | {key: value} for key, value in edits.items()]
    damaged += [content | {"scores": scores} for scores in ([1], {"overall": None}, {"a": 1}, {"a": "x", "overall": 1})]
    for edited in damaged:
        path.write_text(json.dumps(edited))
        with pytest.raises(UsageError, match=re.escape(f"{path} holds no scores")):
            ScoreRow.load(path)


def test_a_row_keeps_its_fidelity(tmp_path):
    fidelity = Fidelity([Likeness(20.0, 0.5), Likeness(30.0, 0.7), Likeness(40.0, 0.9)], [NoiseLevel(0.1, 0.9, 0.2)])
    path, header, kept = tmp_path / "removed.json", Header("ppcl.scores", {}), replace(row(), fidelity=fidelity)
    kept.save(path, header, {})
    assert ScoreRow.load(path) == kept
    content = json.loads(path.read_text())["fidelity"]
    assert (content["psnr"], content["ssim"]) == (kept.psnr, kept.ssim) == pytest.approx((30.0, 0.7))
    assert fidelity.prompts(3) == [fidelity.mean]
    assert fidelity.prompts(1) == fidelity.pictures
    for damaged in (
        {},
        {"pictures": [{"psnr": 1}], "noise_levels": []},
        content | {"pictures": [{"psnr": "x", "ssim": 1}]},
    ):
        path.write_text(json.dumps(header.to_json() | kept.to_json() | {"fidelity": damaged}))
        with pytest.raises(UsageError, match="holds no scores"):
            ScoreRow.load(path)


def test_noise_levels_have_equally_many_samples_and_are_parts_of_the_whole_error():
    rng = np.random.default_rng(0)
    samples = [tuple(values) for values in rng.random((64, 3))]
    levels = NoiseLevel.grouped(samples)
    parts = [[sample for sample in samples if level.low <= sample[0] <= level.high] for level in levels]
    assert [len(part) for part in parts] == [16] * 4
    for level, part in zip(levels, parts, strict=True):
        assert level.velocity_error == pytest.approx(sum(s[1] for s in part) / sum(s[2] for s in part))
    assert levels == sorted(levels, key=lambda level: level.low)
    assert NoiseLevel.grouped([]) == []


def test_a_worse_score_is_a_drop_also_below_zero():
    teacher = row()
    assert ComparedRow.beside(teacher, row("ppcl-depth", 0.6, 5)).drop_percent == pytest.approx(25)
    assert ComparedRow.beside(teacher, row("ppcl-depth", 0.6, 5)).params_ratio == 0.5
    assert ComparedRow.beside(row(overall=-2.0), row("ppcl-depth", -3.0)).drop_percent == pytest.approx(50)
    assert ComparedRow.beside(row(overall=0.0), row("ppcl-depth", 0.5)).drop_percent == 0
