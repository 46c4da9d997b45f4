"""Pictures for the report: a few of each set of prompts that the run has drawn, by variant."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ppcl.artifacts.files import read_json
from ppcl.config import STORED_VARIANTS
from ppcl.context import Run
from ppcl.pictures.drawing import given_pictures
from ppcl.pictures.images import image_folder, read_image
from ppcl.validation.outputs import has_own_prompts

PER_CATEGORY, WITHOUT_CATEGORIES = 2, 12
OWN_SETS, OWN_PROMPTS = 3, 6
_LOSSLESS = 128  # pixels; wider pictures are embedded as JPEG


@dataclass
class Sheet:
    """Some pictures of one set: a row per variant, a column per prompt.

    `fails`, by variant: whether a picture does not show what its prompt asks for; None where that is not judged.
    """

    folder: Path
    captions: list[str]
    rows: dict[str, list[Image.Image]]
    fails: dict[str, list[bool | None]] = field(default_factory=dict)
    remark: str = ""

    @property
    def judged(self) -> bool:
        return any(fails is not None for row in self.fails.values() for fails in row)

    def cells(self, largest: int) -> list[dict[str, Any]]:
        """Rows as the page's template takes them, with pictures of at most `largest` pixels a side."""
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
    """A picture as a data URI; a large one is reduced to `largest` pixels a side."""
    small = image.width <= _LOSSLESS
    if not small:
        image = image.copy()
        image.thumbnail((largest, largest))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG" if small else "JPEG", quality=88)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def some_of(categories: Sequence[Hashable]) -> list[int]:
    """Numbers of the first few prompts of each category, or of more prompts where there is only one category."""
    groups: dict[Hashable, list[int]] = {}
    for number, category in enumerate(categories):
        groups.setdefault(category, []).append(number)
    each = PER_CATEGORY if len(groups) > 1 else WITHOUT_CATEGORIES
    return [number for numbers in groups.values() for number in numbers[:each]]


def compared_sheet(run: Run, names: Sequence[str], *, judge: bool) -> Sheet | None:
    """The pictures of the prompts that `names` are compared on; None where this run has drawn none.

    `judge`: mark those that fail their prompt, where the benchmark can tell.
    """
    folder = image_folder(run, names[0]).parent
    if has_own_prompts(run.config) or not judge:
        return drawn_sheet(folder, names, WITHOUT_CATEGORIES)
    each = run.benchmark.images_per_prompt
    numbers = [each * number for number in some_of([prompt.category for prompt in run.prompts[::each]])]
    prompts = [run.prompts[number] for number in numbers]
    rows = {name: [read_image(run, name, number) for number in numbers] for name in names}
    verdicts = {name: map(run.benchmark.fulfils, prompts, images) for name, images in rows.items()}
    fails = {name: [None if good is None else not good for good in row] for name, row in verdicts.items()}
    if all(prompt.references for prompt in prompts):  # an edit means nothing without what was edited
        rows = {"given": [given_pictures(run, prompt)[0].convert("RGB") for prompt in prompts]} | rows
    return Sheet(folder, [prompt.text for prompt in prompts], rows, fails)


def drawn_sheet(folder: Path, names: Sequence[str], most: int) -> Sheet | None:
    """The first picture of up to `most` prompts in `folder/<variant>`, as its `prompts.jsonl` lists them."""
    names = [name for name in names if (folder / name / "prompts.jsonl").exists()]
    if not names:
        return None
    firsts: dict[str, dict[str, Any]] = {}
    for line in (folder / names[0] / "prompts.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        firsts.setdefault(record["prompt"], record)
    shown = list(firsts.values())[:most]
    rows = {}
    for name in names:
        paths = [folder / name / record["image"] for record in shown]
        if all(path.exists() for path in paths):
            rows[name] = [_read(path) for path in paths]
    if not rows:
        return None
    remark = f"{len(firsts)} prompt{'s' if len(firsts) > 1 else ''}"
    seed = shown[0].get("seed")
    return Sheet(
        folder, [r["prompt"] for r in shown], rows, remark=remark if seed is None else f"{remark}, seed {seed}"
    )


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def own_sheets(images: Path, compared: Path) -> list[Sheet]:
    """The newest few sets of prompts in the folder `images`, without `compared`: teacher and furthest variant."""
    newest: dict[Path, float] = {}
    for manifest in images.glob("*/*/manifest.json"):
        folder = manifest.parent.parent
        if folder != compared and manifest.parent.name in STORED_VARIANTS and _is_own(manifest):
            newest[folder] = max(newest.get(folder, 0.0), manifest.stat().st_mtime)
    sheets = []
    for folder in sorted(newest, key=lambda folder: -newest[folder])[:OWN_SETS]:
        there = [name for name in STORED_VARIANTS if (folder / name / "manifest.json").exists()]
        pair = [name for name in ("teacher", there[-1]) if name in there]
        sheet = drawn_sheet(folder, list(dict.fromkeys(pair)), OWN_PROMPTS)
        if sheet is not None:
            sheets.append(sheet)
    return sheets


def _is_own(manifest: Path) -> bool:
    """Whether pictures are of the user's prompts: those of a benchmark lie in a folder of its name."""
    made_from = read_json(manifest, "The pictures").get("made_from", {})
    benchmark = made_from.get("benchmark", {}).get("name", "shapes")
    return manifest.parent.parent.name != benchmark
