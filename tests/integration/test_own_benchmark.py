"""A benchmark is added as a user adds one: a module and a YAML, and every stage goes by it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import INTERVALS, digests, ppcl, succeed
from PIL import Image

from ppcl import benchmarks, cli

MODULE = '''
"""How bright pictures are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ppcl.artifacts.scores import Scores
from ppcl.benchmarks.base import Benchmark, Prompt
from ppcl.config import Config
from ppcl.families.base import Family


@dataclass(kw_only=True)
class Bright(Benchmark):
    scale: float = 1.0
    label = "mean brightness of pictures"

    def prompts(self, family: Family, config: Config) -> list[Prompt]:
        return [Prompt("a red circle", "round"), Prompt("a blue square", "edged")]

    def score(self, prompts: Sequence[Prompt], images: Iterable[Image.Image]) -> Scores:
        values = [self.scale * np.asarray(image).mean() / 255 for image in images]
        return Scores.by_category([prompt.category for prompt in prompts], values)
'''
YAML = "name: bright\nsettings:\n  scale: 0.5\n  images_per_prompt: 2\n"


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The two files where they are found, and a folder for runs."""
    folder = tmp_path_factory.mktemp("bright")
    (folder / "modules").mkdir()
    (folder / "modules" / "bright.py").write_text(MODULE)
    shutil.copytree(cli.conf_dir(), folder / "conf")
    (folder / "conf" / "benchmark" / "bright.yaml").write_text(YAML)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(folder / "modules")])
        patch.setattr(cli, "conf_dir", lambda: folder / "conf")
        yield folder
    sys.modules.pop("ppcl.benchmarks.bright", None)


@pytest.fixture(scope="module")
def command(settings: list[str], added: Path) -> list[str]:
    small = [INTERVALS, "generate.variants=[teacher,removed]", "seed=7"]
    return [*settings, "benchmark=bright", f"paths.runs_dir={added / 'runs'}", "name=bright", *small]


@pytest.fixture(scope="module")
def folder(command: list[str], added: Path) -> Path:
    succeed(*command, "stages=[generate,evaluate,report]")
    return added / "runs" / "bright"


def test_pictures_lie_under_its_name_each_prompt_twice(folder: Path) -> None:
    assert [path.name for path in (folder / "images").iterdir()] == ["bright"]
    for variant in ("teacher", "removed"):
        pictures = folder / "images" / "bright" / variant
        assert len(list(pictures.glob("0*.png"))) == 4
        lines = [json.loads(line) for line in (pictures / "prompts.jsonl").read_text().splitlines()]
        texts = ["a red circle", "a red circle", "a blue square", "a blue square"]
        assert [(line["prompt"], line["seed"]) for line in lines] == list(zip(texts, range(7, 11), strict=True))
        manifest = json.loads((pictures / "manifest.json").read_text())
        expected = {"name": "bright", "settings": {"scale": 0.5, "images_per_prompt": 2}}
        assert manifest["made_from"]["benchmark"] == expected
        assert manifest["made_from"]["prompts"]["count"] == manifest["num_images"] == 4


def test_rows_have_its_categories_and_scores(folder: Path) -> None:
    report = json.loads((folder / "report" / "bright" / "report.json").read_text())
    assert report["benchmark"]["name"] == "bright"
    for row in report["variants"]:
        drawn = folder / "images" / "bright" / row["name"]
        pictures = [np.asarray(Image.open(drawn / f"{number:05d}.png")) for number in range(4)]
        first, second = (np.mean([picture.mean() / 510 for picture in pictures[n : n + 2]]) for n in (0, 2))
        expected = {"round": first, "edged": second, "overall": (first + second) / 2}
        assert row["scores"] == pytest.approx(expected)
        assert list(row["scores"]) == list(expected)
        assert json.loads((folder / "scores" / "bright" / f"{row['name']}.json").read_text())["scores"] == row["scores"]
    assert report["variants"][1]["drop_percent"] != 0


def test_the_page_and_the_sheet_speak_of_it(folder: Path) -> None:
    page = (folder / "report" / "bright" / "report.html").read_text()
    assert "Score: mean brightness of pictures, higher is better" in page
    assert "Measured over 2 prompts with 2 pictures each" in page
    assert "<th>round</th><th>edged</th><th>score</th>" in page
    assert "red frame" not in page  # it judges no single picture
    sheet = np.asarray(Image.open(folder / "report" / "bright" / "samples.png").convert("RGB")).astype(int)
    assert not (np.abs(sheet - [0xC0, 0x39, 0x2B]).sum(axis=-1) == 0).any()


def test_the_model_card_speaks_of_it(command: list[str], folder: Path, trained: Path) -> None:
    run = folder.parent / "exported"
    shutil.copytree(trained / "plugs", run / "plugs")
    again = [*command, "name=exported", "generate.variants=[teacher,ppcl-depth]", "export.variant=ppcl-depth"]
    succeed(*again, "stages=[generate,evaluate]")
    succeed(*again, "stages=[export]")
    card = (run / "export" / "README.md").read_text()
    assert "Mean brightness of pictures, with equal prompts, seeds and settings:" in card
    assert "| variant | round | edged | overall | drop % |" in card


@pytest.mark.parametrize("change", ["benchmark.settings.scale=0.25", "benchmark.settings.images_per_prompt=1"])
def test_other_settings_draw_another_set(command: list[str], folder: Path, change: str) -> None:
    others = {path.name for path in (folder / "images").iterdir()}
    before = digests(folder / "images" / "bright")
    succeed(*command, "stages=[generate]", change)
    (name,) = {path.name for path in (folder / "images").iterdir()} - others
    assert name.startswith("bright-")
    assert digests(folder / "images" / "bright") == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("+benchmark.settings.brightness=1", "benchmark.settings.brightness"),
        ("benchmark.settings.scale=dark", "benchmark.settings.scale"),
        ("benchmark=drawbench", "conf/benchmark has auto, bright, "),
        ("benchmark.name=drawbench", "benchmark.name=drawbench is not one of bright, "),
    ],
)
def test_what_it_was_not_made_for_is_refused(command: list[str], folder: Path, change: str, said: str) -> None:
    outcome = ppcl(*command, "stages=[generate]", change)
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_benchmark_without_given_pictures_is_not_for_an_edit_model(command: list[str], added: Path) -> None:
    from ppcl.families.qwen_image_edit.tiny import build_pipeline

    build_pipeline(0, 6).save_pretrained(added / "edit")
    edit = [f"model.path={added / 'edit'}", "name=edit", "model.sampling.height=1024", "model.sampling.width=1024"]
    outcome = ppcl(*command, *edit, "stages=[generate]")
    assert outcome.code == 2
    assert "gives 0 pictures with a prompt, and model.family=qwen_image_edit takes 1." in outcome.err
