"""Which pictures the report shows, and how large they are embedded."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from ppcl.report.sheets import OWN_PROMPTS, OWN_SETS, embedded, own_sheets, some_of


def draw(folder: Path, prompts: list[str], *, made_from: dict | None = None, time: int = 0, color: str = "red") -> None:
    """Pictures of a variant as `generate` leaves them, drawn at `time`."""
    folder.mkdir(parents=True)
    records = []
    for number, prompt in enumerate(prompts):
        Image.new("RGB", (8, 8), color).save(folder / f"{number:05d}.png")
        records.append({"image": f"{number:05d}.png", "prompt": prompt, "seed": 7 + number})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "manifest.json").write_text(json.dumps({"made_from": made_from or {}}))
    os.utime(folder / "manifest.json", (time, time))


def test_a_few_prompts_of_each_category_or_more_of_one() -> None:
    assert some_of(["a", "a", "a", "b", "b", "b", "b"]) == [0, 1, 3, 4]
    assert some_of([None] * 20) == list(range(12))
    assert some_of([None]) == [0]


def test_the_users_newest_sets_are_shown_without_a_benchmarks(tmp_path: Path) -> None:
    for number in range(OWN_SETS + 1):
        draw(tmp_path / f"set{number}" / "teacher", ["a red circle"], time=100 + number)
    draw(tmp_path / "shapes" / "teacher", ["a circle"], time=200)
    draw(tmp_path / "shapes-0a1b2c" / "teacher", ["a circle"], time=200)
    draw(tmp_path / "bright" / "teacher", ["a circle"], made_from={"benchmark": {"name": "bright"}}, time=200)
    draw(tmp_path / "compared" / "teacher", ["a circle"], time=200)
    (tmp_path / "unfinished" / "teacher").mkdir(parents=True)
    sheets = own_sheets(tmp_path, tmp_path / "compared")
    assert [sheet.folder.name for sheet in sheets] == ["set3", "set2", "set1"]
    assert own_sheets(tmp_path / "nothing", tmp_path / "compared") == []


def test_a_set_shows_the_teacher_beside_the_furthest_variant(tmp_path: Path) -> None:
    prompts = [f"prompt {number}" for number in range(OWN_PROMPTS + 2) for _ in range(2)]
    draw(tmp_path / "mine" / "teacher", prompts)
    draw(tmp_path / "mine" / "removed", prompts)
    draw(tmp_path / "mine" / "ppcl-finetuned", prompts, time=1)
    draw(tmp_path / "mine" / "ppcl-finetuned-0a1b2c", prompts, time=2, color="blue")  # of a later model
    (sheet,) = own_sheets(tmp_path, tmp_path / "shapes")
    assert list(sheet.rows) == ["teacher", "ppcl-finetuned"]
    assert sheet.captions == [f"prompt {number}" for number in range(OWN_PROMPTS)]
    assert sheet.rows["ppcl-finetuned"][0].getpixel((0, 0)) == (0, 0, 255)
    assert sheet.remark == "8 prompts, seed 7"
    assert not sheet.judged


def test_a_set_without_the_teacher_shows_the_variant_alone(tmp_path: Path) -> None:
    draw(tmp_path / "mine" / "ppcl-depth", ["a red circle"])
    (sheet,) = own_sheets(tmp_path, tmp_path / "shapes")
    assert list(sheet.rows) == ["ppcl-depth"]
    (row,) = sheet.cells(256)
    assert row["pictures"][0]["caption"] == "a red circle"


@pytest.mark.parametrize(("size", "expected"), [((32, 32), (32, 32)), ((1328, 664), (256, 128))])
def test_large_pictures_are_embedded_smaller(size: tuple[int, int], expected: tuple[int, int]) -> None:
    header, _, content = embedded(Image.new("RGB", size), 256).partition(",")
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.size == expected
        assert header == f"data:image/{str(image.format).lower()};base64"
