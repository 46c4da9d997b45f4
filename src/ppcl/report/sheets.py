"""Selects pictures for the report: some prompts of each set that the run has drawn, by variant."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ppcl.artifacts.files import read_json
from ppcl.config import STORED_VARIANTS
from ppcl.context import Run
from ppcl.pictures.drawing import given_pictures
from ppcl.pictures.images import image_folder, read_image

PER_CATEGORY, WITHOUT_CATEGORIES = 2, 12  # prompts per category, and prompts in all if there are no categories
OWN_SETS, OWN_PROMPTS = 3, 6  # sets of the user's own prompts, and prompts of each
_LOSSLESS = 128  # pixels; wider pictures are embedded as JPEG, others as PNG


@dataclass
class Sheet:
    """Pictures of one set, with a row for each variant and a column for each prompt.

    `folder`: the folder of the set.
    `fails`: for each variant, whether its pictures fail their prompts; None where that is not judged.
    `remark`: a line to print with the sheet.
    """

    folder: Path
    captions: list[str]
    rows: dict[str, list[Image.Image]]
    fails: dict[str, list[bool | None]] = field(default_factory=dict)
    remark: str = ""

    @property
    def judged(self) -> bool:
        """Whether any picture was judged by its prompt."""
        return any(fails is not None for row in self.fails.values() for fails in row)

    def cells(self, largest: int) -> list[dict[str, Any]]:
        """Return the rows as the template expects them, with pictures of at most `largest` pixels per side."""
        return [
            {
                "name": name,
                "pictures": [
                    {
                        "source": embedded(image, largest),
                        "caption": caption,
                        "pixels": image.width <= _LOSSLESS,
                        "fails": bool(fails),
                    }
                    for image, caption, fails in zip(
                        images, self.captions, self.fails.get(name, [None] * len(images)), strict=True
                    )
                ],
            }
            for name, images in self.rows.items()
        ]


def embedded(image: Image.Image, largest: int) -> str:
    """Return a picture as a data URI, reduced to `largest` pixels per side."""
    small = image.width <= _LOSSLESS
    if not small:
        image = image.copy()
        image.thumbnail((largest, largest))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG" if small else "JPEG", quality=88)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def some_of(categories: Sequence[Hashable]) -> list[int]:
    """Return the numbers of the first prompts of each category, or of more prompts if there is only one category."""
    groups: dict[Hashable, list[int]] = {}
    for number, category in enumerate(categories):
        groups.setdefault(category, []).append(number)
    each = PER_CATEGORY if len(groups) > 1 else WITHOUT_CATEGORIES
    return [number for numbers in groups.values() for number in numbers[:each]]


def compared_sheet(run: Run, names: Sequence[str]) -> Sheet:
    """Return pictures of the variants `names` for some of the prompts that they are compared on."""
    each = run.benchmark.images_per_prompt
    numbers = [each * number for number in some_of([prompt.category for prompt in run.prompts[::each]])]
    prompts = [run.prompts[number] for number in numbers]
    rows = {name: [read_image(run, name, number) for number in numbers] for name in names}
    verdicts = {name: map(run.benchmark.fulfils, prompts, images) for name, images in rows.items()}
    fails = {name: [None if good is None else not good for good in row] for name, row in verdicts.items()}
    if all(prompt.references for prompt in prompts):  # show the picture to edit beside the results
        rows = {"given": [given_pictures(run, prompt)[0].convert("RGB") for prompt in prompts]} | rows
    return Sheet(image_folder(run, names[0]).parent, [prompt.text for prompt in prompts], rows, fails)


def own_sheets(images: Path, compared: Path) -> list[Sheet]:
    """Return the newest sets of the user's own prompts in the folder `images`, at most `OWN_SETS`.

    Each has the pictures of the teacher and of the latest variant. The set `compared` and sets of benchmarks are left
    out.
    """
    newest: dict[Path, float] = {}
    for manifest in images.glob("*/*/manifest.json"):
        folder = manifest.parent.parent
        if folder != compared and _is_own(folder, read_json(manifest, "The pictures").get("made_from", {})):
            newest[folder] = max(newest.get(folder, 0.0), manifest.stat().st_mtime)
    folders = sorted(newest, key=lambda folder: newest[folder], reverse=True)[:OWN_SETS]
    return [sheet for folder in folders if (sheet := _own_sheet(folder)) is not None]


def _is_own(folder: Path, made_from: Mapping[str, Any]) -> bool:
    """Return whether a set has the user's prompts. Headers name every benchmark except `shapes`."""
    return "benchmark" not in made_from and not re.fullmatch(r"shapes(-[0-9a-f]{6})?", folder.name)


def _own_sheet(folder: Path) -> Sheet | None:
    """Return the first picture of some of a set's prompts, by the teacher and the latest variant; None without any."""
    drawn: dict[str, Path] = {}
    for manifest in sorted(folder.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime):
        found = re.fullmatch(rf"({'|'.join(STORED_VARIANTS)})(-[0-9a-f]{{6}}(-\d+)?)?", manifest.parent.name)
        if found:
            drawn[found[1]] = manifest.parent
    furthest = max(drawn, key=STORED_VARIANTS.index, default=None)
    names = [name for name in STORED_VARIANTS if name in drawn and name in ("teacher", furthest)]
    firsts: dict[str, dict[str, Any]] = {}
    for line in (drawn[names[-1]] / "prompts.jsonl").read_text(encoding="utf-8").splitlines() if names else ():
        record = json.loads(line)
        firsts.setdefault(record["prompt"], record)
    shown = list(firsts.values())[:OWN_PROMPTS]
    if not shown:
        return None
    rows = {name: [_read(drawn[name] / record["image"]) for record in shown] for name in names}
    remark = f"{len(firsts)} prompt{'s' if len(firsts) > 1 else ''}, seed {shown[0]['seed']}"
    return Sheet(folder, [record["prompt"] for record in shown], rows, remark=remark)


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
