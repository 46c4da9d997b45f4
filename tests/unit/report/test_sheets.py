"""Which pictures the report shows, and how large they are embedded."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from ppcl.report.sheets import MOST, OWN_PROMPTS, OWN_SETS, Sheet, embedded, model_key, own_sheets, some_of


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


def sheets_of(images: Path, current: dict[str, dict] | None = None, said: list[str] | None = None) -> list[Sheet]:
    """The sheets of a run whose variants are the models `current`, by default those that name no model."""

    def key(variant: str) -> str | None:
        return model_key({}) if current is None else model_key(current[variant]) if variant in current else None

    return own_sheets(images, images / "compared", key, ([] if said is None else said).append)


def test_a_few_prompts_of_each_category_or_more_of_one() -> None:
    assert some_of(["a", "a", "a", "b", "b", "b", "b"]) == [0, 1, 3, 4]
    assert some_of([None] * 20) == list(range(12))
    assert some_of([None]) == [0]
    assert some_of(range(5000)) == [*range(MOST)]  # a sheet has a column for each


def test_the_users_newest_sets_are_shown_without_a_benchmarks(tmp_path: Path) -> None:
    for number in range(OWN_SETS + 1):
        draw(tmp_path / f"set{number}" / "teacher", ["a red circle"], time=100 + number)
    draw(tmp_path / "shapes" / "teacher", ["a circle"], time=200)
    draw(tmp_path / "shapes-0a1b2c" / "teacher", ["a circle"], time=200)
    draw(tmp_path / "bright" / "teacher", ["a circle"], made_from={"benchmark": {"name": "bright"}}, time=200)
    draw(tmp_path / "compared" / "teacher", ["a circle"], time=200)
    (tmp_path / "unfinished" / "teacher").mkdir(parents=True)
    sheets = sheets_of(tmp_path)
    assert [sheet.folder.name for sheet in sheets] == ["set3", "set2", "set1"]
    assert sheets_of(tmp_path / "nothing") == []


def test_a_set_shows_the_teacher_beside_the_furthest_variant(tmp_path: Path) -> None:
    prompts = [f"prompt {number}" for number in range(OWN_PROMPTS + 2) for _ in range(2)]
    draw(tmp_path / "mine" / "teacher", prompts)
    draw(tmp_path / "mine" / "removed", prompts)
    draw(tmp_path / "mine" / "ppcl-finetuned", prompts, time=1)
    (sheet,) = sheets_of(tmp_path)
    assert list(sheet.rows) == ["teacher", "ppcl-finetuned"]
    assert sheet.captions == [f"prompt {number}" for number in range(OWN_PROMPTS)]
    assert sheet.remark == "8 prompts, seed 7"
    assert not sheet.judged


PLANNED, OTHER = ({"plugs": {"transformer_blocks.1-2": key}} for key in ("aa", "bb"))


def test_only_pictures_of_current_models_are_shown(tmp_path: Path) -> None:
    draw(tmp_path / "mine" / "teacher", ["a circle"], made_from={"model": "here", "seed": 1})
    draw(tmp_path / "mine" / "ppcl-planned", ["a circle"], made_from=PLANNED | {"seed": 1}, color="blue")
    draw(tmp_path / "mine" / "ppcl-planned-0a1b2c", ["a circle"], made_from=OTHER | {"seed": 1}, time=2)
    (sheet,) = sheets_of(tmp_path, {"teacher": {"model": "here"}, "ppcl-planned": PLANNED})
    assert sheet.rows["ppcl-planned"][0].getpixel((0, 0)) == (0, 0, 255)
    assert sheet.remark == "1 prompt, seed 7"
    (sheet,) = sheets_of(tmp_path, {"teacher": {"model": "there"}, "ppcl-planned": OTHER})
    assert {name: row[0].getpixel((0, 0)) for name, row in sheet.rows.items()} == {"ppcl-planned": (255, 0, 0)}
    assert sheet.remark == "1 prompt, seed 7; pictures of teacher are not of this run's current model and left out"
    said: list[str] = []
    assert sheets_of(tmp_path, {}, said) == []
    (line,) = said
    assert line.endswith(
        "mine is left out: its pictures of teacher and ppcl-planned are not of this run's current model."
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("00000.png", None),
        ("00000.png", b"PNG"),
        ("prompts.jsonl", None),
        ("prompts.jsonl", b"{bad"),
        ("prompts.jsonl", b'{"image": "00000.png"}'),
        ("prompts.jsonl", b"7"),
        ("manifest.json", b"{bad"),
        ("manifest.json", b'{"made_from": null}'),
    ],
)
def test_a_damaged_set_is_left_out_with_a_line(name: str, content: bytes | None, tmp_path: Path) -> None:
    draw(tmp_path / "good" / "teacher", ["a circle"])
    draw(tmp_path / "bad" / "teacher", ["a circle"], time=1)
    path = tmp_path / "bad" / "teacher" / name
    path.unlink() if content is None else path.write_bytes(content)
    said: list[str] = []
    assert [sheet.folder.name for sheet in sheets_of(tmp_path, said=said)] == ["good"]
    (line,) = said
    assert line.startswith(f"{tmp_path / 'bad'} is left out, since a file in it is missing or damaged (")


def test_a_set_without_the_teacher_shows_the_variant_alone(tmp_path: Path) -> None:
    draw(tmp_path / "mine" / "ppcl-depth", ["a red circle"])
    (sheet,) = sheets_of(tmp_path)
    assert list(sheet.rows) == ["ppcl-depth"]
    (row,) = sheet.cells(256)
    assert row["pictures"][0]["caption"] == "a red circle"


@pytest.mark.parametrize(("size", "expected"), [((32, 32), (32, 32)), ((1328, 664), (256, 128))])
def test_large_pictures_are_embedded_smaller(size: tuple[int, int], expected: tuple[int, int]) -> None:
    header, _, content = embedded(Image.new("RGB", size), 256).partition(",")
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.size == expected
        assert header == f"data:image/{str(image.format).lower()};base64"
