"""Own data has no score: its held-out captions are drawn and compared with the teacher's pictures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from commands import INTERVALS, ppcl, succeed
from PIL import Image

from ppcl.data.cached import held_out_keys
from ppcl.data.worlds import shapes

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
    assert (run / "report" / "report.html").exists()


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
