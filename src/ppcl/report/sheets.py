"""Selects pictures for the report: some prompts of each set that the run has drawn, by variant."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ppcl.artifacts.files import again, read_json
from ppcl.artifacts.folders import check_files
from ppcl.artifacts.headers import fingerprint
from ppcl.config import STORED_VARIANTS
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.pictures.drawing import given_pictures
from ppcl.pictures.images import image_folder, read_image, read_picture, variant_header
from ppcl.pictures.sets import OF_MODEL
from ppcl.variants.variants import variants_of

PER_CATEGORY, WITHOUT_CATEGORIES = 2, 12  # prompts per category, and prompts in all if there are no categories
MOST = 32  # prompts of any sheet
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
                    cell(image, caption, largest) | {"fails": bool(fails)}
                    for image, caption, fails in zip(
                        images, self.captions, self.fails.get(name, [None] * len(images)), strict=True
                    )
                ],
            }
            for name, images in self.rows.items()
        ]


def cell(image: Image.Image, caption: str, largest: int) -> dict[str, Any]:
    """Return a picture and its caption as the template expects them, with at most `largest` pixels per side."""
    return {"source": embedded(image, largest), "caption": caption, "pixels": image.width <= _LOSSLESS}


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
    """Return the numbers of the first prompts of each category, or of more prompts if there is only one category.

    With many categories they are of the first ones alone, `MOST` in all: a sheet has a column for each.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, category in enumerate(categories):
        groups.setdefault(category, []).append(number)
    each = PER_CATEGORY if len(groups) > 1 else WITHOUT_CATEGORIES
    return [number for numbers in groups.values() for number in numbers[:each]][:MOST]


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


def model_key(made_from: Mapping[str, Any]) -> str:
    """Return a fingerprint of the model that a header of pictures names, whatever their prompts and settings are."""
    return fingerprint({key: value for key, value in made_from.items() if key in OF_MODEL})


def current_model(run: Run, variant: str) -> str | None:
    """Return the `model_key` of the model that `variant` is in this run now; None if the run has no such variant."""
    try:
        (found,), plugs = variants_of(run, [variant])
        return model_key(variant_header(run, found, plugs).made_from)
    except UsageError:
        return None


def own_sheets(
    images: Path, compared: Path, current: Callable[[str], str | None], say: Callable[[str], None]
) -> list[Sheet]:
    """Return the newest sets of the user's own prompts in the folder `images`, at most `OWN_SETS`.

    Each has the pictures of the teacher and of the furthest variant, as far as they are of the run's current models.
    The set `compared` and sets of benchmarks are left out. So are damaged sets and those of other models, with a line.

    `current`: returns the `model_key` of a variant's current model, or None.
    `say`: prints a line.
    """
    newest: dict[Path, float] = {}
    for manifest in images.glob("*/*/manifest.json"):
        folder = manifest.parent.parent
        if folder != compared:
            newest[folder] = max(newest.get(folder, 0.0), manifest.stat().st_mtime)
    sheets: list[Sheet] = []
    for folder in sorted(newest, key=lambda folder: newest[folder], reverse=True):
        if len(sheets) == OWN_SETS:
            break
        try:
            sheet = _own_sheet(folder, current)
        except _DAMAGED as error:
            what = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
            say(
                f"{folder} is left out, since a file in it is missing or damaged ({what}); delete it and draw it again."
            )
            continue
        if isinstance(sheet, Sheet):
            sheets.append(sheet)
        elif sheet:
            say(f"{folder} is left out: {sheet}")
    return sheets


# What reading a set raises if a file was deleted, cut off, or edited by hand. A damaged PNG is a SyntaxError.
_DAMAGED = (UsageError, OSError, SyntaxError, ValueError, KeyError, TypeError, AttributeError)


def _is_own(folder: Path, made_from: Mapping[str, Any]) -> bool:
    """Return whether a set has the user's prompts. Headers name every benchmark except `shapes`."""
    return "benchmark" not in made_from and not re.fullmatch(r"shapes(-[0-9a-f]{6})?", folder.name)


def _own_sheet(folder: Path, current: Callable[[str], str | None]) -> Sheet | str | None:
    """Return the first picture of some of a set's prompts, by the teacher and by the furthest variant of the run.

    Returns None if they are not the user's own prompts, and a sentence if all pictures are of other models.
    """
    drawn: dict[str, dict[str, Path]] = {}  # for each variant the folder of each model, by its key
    for manifest in sorted(folder.glob("*/manifest.json")):
        made_from = read_json(manifest, "The pictures").get("made_from", {})
        if not _is_own(folder, made_from):
            return None
        found = re.fullmatch(rf"({'|'.join(STORED_VARIANTS)})(-[0-9a-f]{{6}}(-\d+)?)?", manifest.parent.name)
        if found:
            drawn.setdefault(found[1], {})[model_key(made_from)] = manifest.parent
    shown, without = _shown(drawn, current)
    outdated = f"pictures of {' and '.join(without)} are not of this run's current model"
    if not shown:
        return f"its {outdated}." if without else None
    firsts: dict[str, dict[str, Any]] = {}
    for line in (list(shown.values())[-1] / "prompts.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        firsts.setdefault(record["prompt"], record)
    records = list(firsts.values())[:OWN_PROMPTS]
    if not records:
        return None
    for place in shown.values():
        check_files(place, read_json(place / "manifest.json", "The record", "generate"), again("generate"))
    rows = {name: [read_picture(place / record["image"]) for record in records] for name, place in shown.items()}
    remark = f"{len(firsts)} prompt{'s' if len(firsts) > 1 else ''}, seed {records[0]['seed']}"
    remark += f"; {outdated} and left out" if without else ""
    return Sheet(folder, [record["prompt"] for record in records], rows, remark=remark)


def _shown(
    drawn: Mapping[str, Mapping[str, Path]], current: Callable[[str], str | None]
) -> tuple[dict[str, Path], list[str]]:
    """Return the folders of the teacher and of the furthest variant, and the variants passed over for their models."""
    shown: dict[str, Path] = {}
    without: list[str] = []
    for name in reversed(STORED_VARIANTS):
        if name not in drawn or (shown and name != "teacher"):
            continue
        place = drawn[name].get(current(name) or "")
        if place is None:
            without.append(name)
        else:
            shown[name] = place
    return {name: shown[name] for name in reversed(shown)}, without[::-1]
