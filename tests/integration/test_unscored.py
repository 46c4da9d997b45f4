"""Own data has no score: its held-out captions are drawn and compared with the teacher's pictures."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import INTERVALS, modified, ppcl, succeed
from PIL import Image

from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.folders import list_files
from ppcl.artifacts.scores import ScoreRow
from ppcl.data.cached import held_out_keys
from ppcl.data.worlds import shapes
from ppcl.pictures.fidelity import likeness

NUM_PICTURES = 80


@pytest.fixture(scope="module")
def command(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run on pictures of a folder, most with captions that others have too."""
    folder = tmp_path_factory.mktemp("own")
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "prompt_en"])
        for number in range(NUM_PICTURES):
            scene = shapes.make_scene(5, number)
            Image.fromarray(shapes.render(scene.objects)).save(folder / f"{number:03d}.png")
            writer.writerow([f"{number:03d}.png", scene.caption if number % 2 else f"picture {number % 10}"])
    data = [f"data.path={folder / 'metadata.csv'}", "data.held_out=0.4", f"paths.runs_dir={folder / 'runs'}"]
    return [*settings, *data, "name=own", INTERVALS]


@pytest.fixture(scope="module")
def run(command: list[str]) -> Path:
    """The folder of that run, drawn and compared with nothing but defaults."""
    succeed(*command, "stages=[cache,generate,evaluate,report]")
    return Path(next(a for a in command[::-1] if a.startswith("paths.runs_dir=")).partition("=")[2]) / "own"


def test_the_first_distinct_captions_of_held_out_pictures_are_drawn(run: Path) -> None:
    (folder,) = (run / "images").iterdir()
    assert folder.name == "captions"
    lines = [json.loads(line) for line in (folder / "removed" / "prompts.jsonl").read_text().splitlines()]
    prompts = [line["prompt"] for line in lines]
    records = sorted((run.parent / "cache" / "data").glob("*/*-[0-9][0-9][0-9].json"))
    samples = [item for path in records for item in json.loads(path.read_text())["samples"]]
    keys = held_out_keys([item["key"] for item in samples], 0.4)
    held_out = [item["caption"] for item in samples if item["key"] in keys]
    assert prompts == [*dict.fromkeys(held_out)][:8]
    assert len(list((folder / "removed").glob("0*.png"))) == 8


def test_rows_have_distances_in_place_of_scores(run: Path) -> None:
    rows = {path.stem: json.loads(path.read_text()) for path in (run / "scores").glob("*.json")}
    assert rows.keys() == {"teacher", "removed"}
    for row in rows.values():
        assert row["scores"] is None
        assert row["latency_ms"] > 0
    assert rows["teacher"]["velocity_error"] == rows["teacher"]["latent_distance"] == 0
    assert min(rows["removed"]["velocity_error"], rows["removed"]["latent_distance"]) > 0


def test_each_picture_is_compared_with_the_teachers(run: Path) -> None:
    assert "fidelity" not in json.loads((run / "scores" / "teacher.json").read_text())
    row = ScoreRow.load(run / "scores" / "removed.json")
    assert row.fidelity is not None
    drawn = (
        [Image.open(run / "images" / "captions" / name / f"{number:05d}.png") for name in ("removed", "teacher")]
        for number in range(8)
    )
    assert row.fidelity.pictures == [likeness(*pair) for pair in drawn]
    errors = [level.velocity_error for level in row.fidelity.noise_levels]
    assert len(errors) == 4
    assert row.velocity_error is not None
    assert min(errors) < row.velocity_error < max(errors)


def test_the_report_shows_the_worst_prompts_first(run: Path) -> None:
    section = (run / "report" / "report.html").read_text().partition("<h2>Fidelity</h2>")[2].partition("<h2>")[0]
    assert section.count('alt="') == 4 * 2 + 1  # pairs, and the plot of errors by noise level
    fidelity = ScoreRow.load(run / "scores" / "removed.json").fidelity
    assert fidelity is not None
    lines = (run / "images" / "captions" / "removed" / "prompts.jsonl").read_text().splitlines()
    ssims = {json.loads(line)["prompt"]: one.ssim for line, one in zip(lines, fidelity.pictures, strict=True)}
    worst = sorted(ssims, key=ssims.__getitem__)
    assert re.findall('<td title="(.*?)">', section) == worst
    assert re.findall('<p class="caption" title="(.*?)">', section) == worst[:4]
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["variants"][1]["fidelity"]["ssim"] == pytest.approx(np.mean([*ssims.values()]))


def test_pictures_of_the_benchmark_none_are_compared_without_drawing_them_anew(run: Path, tmp_path: Path) -> None:
    """Also if they differ in size from prompt to prompt, as results of edits may."""
    shutil.copytree(run, tmp_path / "own")
    resize(tmp_path / "own", ("teacher", "removed"), range(8))
    drawn = modified(tmp_path / "own" / "images")
    again = [f"run={tmp_path / 'own'}", "trainer.accelerator=cpu", "logger=csv"]
    for benchmark, compared in (("none", False), ("fidelity", True)):
        said = succeed(*again, f"benchmark={benchmark}", "stages=[generate,evaluate]")
        assert said.out.count("reused") == 2  # the pictures of both variants, no scores
        assert ("fidelity" in json.loads((tmp_path / "own" / "scores" / "removed.json").read_text())) == compared
    assert modified(tmp_path / "own" / "images") == drawn
    logged = "".join(path.read_text() for path in (tmp_path / "own").rglob("metrics.csv"))
    assert {"removed/psnr", "removed/ssim"} <= {*re.split(r"[,\s]", logged)}
    succeed(*again, "stages=[report]")
    page = (tmp_path / "own" / "report" / "report.html").read_text()
    assert page.count('alt="') == 2 * 8 + 4 * 2 + 2  # all pictures, pairs of the worst, and plots
    assert len({*re.findall(r"removed/velocity_error_0\.\d\d_0\.\d\d", logged)}) == 4


def resize(run: Path, variants: tuple[str, ...], numbers: range) -> None:
    """Enlarge the pictures of some variants, each by another factor, as if they had been drawn so."""
    for folder in [run / "images" / "captions" / name for name in variants]:
        for path in [folder / f"{number:05d}.png" for number in numbers]:
            with Image.open(path) as image:
                larger = image.resize((image.width + 8 * int(path.stem) + 8, image.height))
            larger.save(path)
        record = read_json(folder / "manifest.json", "The record")
        write_json(folder / "manifest.json", record | list_files(folder))


def test_pictures_of_another_size_than_the_teachers_are_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "own")
    shutil.rmtree(tmp_path / "own" / "scores")
    resize(tmp_path / "own", ("removed",), range(3, 4))
    refused = ppcl(f"run={tmp_path / 'own'}", "trainer.accelerator=cpu", "stages=[evaluate]")
    assert refused.code == 2
    assert "removed/00003.png has 64x32 pixels, and the teacher's 32x32: delete both folders" in refused.err


def test_without_data_pictures_alone_are_compared(settings: list[str], tmp_path: Path) -> None:
    """The user's prompts, with two pictures each."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    own = ["data.name=none", f"generate.prompt_file={tmp_path / 'prompts.txt'}", "generate.num_images=2"]
    common = [*settings, f"paths.runs_dir={tmp_path}", "name=bare", INTERVALS, *own]
    succeed(*common, "stages=[generate,evaluate,report]")
    (path,) = (tmp_path / "bare" / "scores").glob("*/removed.json")
    row = ScoreRow.load(path)
    assert row.fidelity is not None
    assert (row.velocity_error, row.fidelity.noise_levels, len(row.fidelity.pictures)) == (None, [], 4)
    (page,) = (tmp_path / "bare" / "report").glob("*/report.html")
    section = page.read_text().partition("<h2>Fidelity</h2>")[2].partition("<h2>")[0]
    assert section.count('alt="') == 2 * 2


def test_a_cache_without_captions_asks_for_prompts(command: list[str], run: Path, tmp_path: Path) -> None:
    """As caches were before captions were kept."""
    (cache,) = (run.parent / "cache" / "data").iterdir()
    (tmp_path / "old").mkdir()
    for path in cache.iterdir():
        content = path.read_bytes()
        if path.suffix == ".json" and b"samples" in content and path.stem[-4] == "-":
            samples = [{k: v for k, v in item.items() if k != "caption"} for item in json.loads(content)["samples"]]
            content = json.dumps({"samples": samples, "skipped": []}).encode()
        (tmp_path / "old" / path.name).write_bytes(content)
    plain = [part for part in command if not part.startswith("data.path=")]
    old = [*plain, f"data.cache={tmp_path / 'old'}", f"paths.runs_dir={tmp_path}", "stages=[generate]"]
    refused = ppcl(*old)
    assert refused.code == 2
    assert "has no held-out captions to draw: give generate.prompt_file=FILE" in refused.err
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    succeed(*old, f"generate.prompt_file={prompts}", "generate.variants=[removed]")
    (drawn,) = (tmp_path / "own" / "images").glob("prompts-*/removed/grid.png")
    assert np.asarray(Image.open(drawn)).std() > 0
