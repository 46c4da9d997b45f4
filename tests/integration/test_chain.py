"""From a teacher to a report, again without work, and refused where something else is asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import NUM_LAYERS, NUM_PROMPTS, digests, modified, ppcl, succeed
from PIL import Image

from ppcl.data.worlds.shapes import CATEGORIES

KEYS = {"name", "num_layers", "params", "params_ratio", "scores", "drop_percent", "latency_ms", "peak_memory_mb"}


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(chain: Path) -> dict:
    return load(chain / "report" / "report.json")


@pytest.fixture(scope="module")
def rows(report: dict) -> dict[str, dict]:
    return {row["name"]: row for row in report["variants"]}


def test_every_stage_leaves_its_artifacts(chain: Path) -> None:
    for path in (
        "config.yaml",
        "versions.json",
        "plan/plan.json",
        "plan/curves.json",
        "plan/similarity.png",
        "export/model_index.json",
        "export/README.md",
        "report/report.html",
        "report/report.json",
        "report/samples.png",
    ):
        assert (chain / path).stat().st_size > 0, path
    for variant in ("teacher", "removed", "ppcl-depth", "ppcl-mixed"):
        assert len(list((chain / "images" / "shapes" / variant).glob("[0-9]*.png"))) == NUM_PROMPTS
    # Nothing temporary and no finished training's checkpoint stays behind.
    assert not [path for path in chain.rglob("*") if path.name.endswith(".tmp")]
    assert not list(chain.rglob("*.ckpt"))
    assert not list(chain.rglob("unfinished.json"))


def test_detected_intervals_have_plugs(chain: Path, report: dict) -> None:
    plan = load(chain / "plan" / "plan.json")
    pairs = plan["intervals"]["transformer_blocks"]
    assert pairs
    assert report["intervals"] == plan["intervals"]
    assert plan["num_layers"] == {"transformer_blocks": NUM_LAYERS}
    names = {f"transformer_blocks.{u}-{v}" for u, v in pairs}
    assert {path.stem for path in (chain / "plugs").glob("*.safetensors")} == names
    assert {path.stem for path in (chain / "plugs").glob("*.json")} == names


def test_report_has_every_variant_and_key(rows: dict[str, dict]) -> None:
    assert list(rows) == ["teacher", "removed", "ppcl-depth", "ppcl-mixed"]
    for row in rows.values():
        assert row.keys() >= KEYS
        assert row["scores"].keys() == {*CATEGORIES, "overall"}
        mean = sum(row["scores"][category] for category in CATEGORIES) / len(CATEGORIES)
        assert row["scores"]["overall"] == pytest.approx(mean)
        assert row["latency_ms"] > 0
        assert row["peak_memory_mb"] > 4 * row["params"] / 1e6


def test_report_numbers_agree(chain: Path, report: dict, rows: dict[str, dict]) -> None:
    saved = {f"transformer_blocks.{u}-{v}": v - u for u, v in report["intervals"]["transformer_blocks"]}
    teacher, removed, depth, mixed = rows.values()
    for row in rows.values():
        assert row["params_ratio"] == row["params"] / teacher["params"]
        gone = sum(saved[name] for name in row["students"] + row["removed"])
        assert row["num_layers"] == NUM_LAYERS - gone
        if teacher["scores"]["overall"]:
            expected = 100 * (1 - row["scores"]["overall"] / teacher["scores"]["overall"])
            assert row["drop_percent"] == pytest.approx(expected)
    assert teacher["params_ratio"] == 1
    assert teacher["drop_percent"] == 0
    assert teacher["students"] == teacher["removed"] == []
    assert set(depth["students"]) == set(removed["removed"]) == set(saved)
    assert removed["params"] == depth["params"] < mixed["params"] < teacher["params"]
    assert set(mixed["students"]) < set(depth["students"])
    assert len(mixed["students"]) == max(1, round(len(saved) * 0.5))
    plan = load(chain / "plan" / "plan.json")["parameters"]
    assert plan == {
        "teacher": teacher["params"],
        "student": depth["params"],
        "teacher_layers": NUM_LAYERS,
        "student_layers": depth["num_layers"],
    }


def test_page_needs_nothing_else(chain: Path) -> None:
    page = (chain / "report" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?\s*(?:https?:)?//", page, re.IGNORECASE)
    assert "url(" not in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) >= 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for target in re.findall(r'href="([^"]*)"', page):
        assert (chain / "report" / target).exists(), target
    for variant in ("teacher", "removed", "ppcl-depth", "ppcl-mixed"):
        assert variant in page


def test_contact_sheet_is_a_picture(chain: Path) -> None:
    with Image.open(chain / "report" / "samples.png") as image:
        image.verify()


def test_second_run_reuses_everything(chain: Path, chain_command: list[str]) -> None:
    folders = [chain / name for name in ("plan", "plugs", "export", "images", "scores")]
    folders.append(chain.parent / "cache")
    before = modified(*folders)
    assert before
    outcome = succeed(*chain_command)
    for stage in ("probe", "detect", "depth", "export", "generate", "evaluate"):
        assert re.search(rf"^ *{stage}  reused ", outcome.out, re.MULTILINE), stage
    assert outcome.out.count("generate  reused ") == 4
    assert modified(*folders) == before


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("distill.relative_update=0.2", "distill.relative_update=0.1, now 0.2"),
        ("method.num_timesteps=3", "method.num_timesteps=2, now 3"),
    ],
)
def test_changed_setting_is_refused(chain: Path, chain_command: list[str], change: str, key: str) -> None:
    before = digests(chain)
    outcome = ppcl(*chain_command, change)
    assert outcome.code == 2
    assert key in outcome.err
    assert "name=" in outcome.err  # the remedy
    assert len(outcome.err) < 1000  # a sentence, not every prompt there is
    # A refused command leaves no trace: config.yaml still tells what the artifacts were made with.
    assert digests(chain) == before


@pytest.mark.parametrize("change", ["benchmark.prompts_per_category=1", "seed=43"])
@pytest.mark.parametrize("stage", ["evaluate", "report"])
def test_pictures_are_judged_by_their_own_prompts(
    chain: Path, chain_command: list[str], change: str, stage: str
) -> None:
    """Picture number n belongs to another prompt where there are fewer per category."""
    command = [argument for argument in chain_command if not argument.startswith("stages=")]
    before = digests(chain)
    outcome = ppcl(*command, f"stages=[{stage}]", change)
    assert outcome.code == 2
    assert digests(chain) == before
