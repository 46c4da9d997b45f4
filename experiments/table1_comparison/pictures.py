"""Figure 6: pictures of the trained models of the comparison, from the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ppcl
from experiments.table1_comparison.cells import Cell
from ppcl.context import Run
from ppcl.pictures.drawing import draw, given_pictures
from ppcl.report import plots

EACH = 2  # prompts of each category


def write(path: Path, cells: Sequence[Cell], prompts: int) -> bool:
    """Draw the same prompts with the teacher and with the trained model of every cell, into one picture.

    Cells whose run is not on this machine are left out. Returns whether there was any. `prompts`: per category, as in
    the table. The first `EACH` of every category are drawn.
    """
    rows: dict[str, list[Any]] = {}
    fails: dict[str, list[bool | None]] = {}
    captions: list[str] = []
    for cell in cells:
        run = cell.run(prompts)
        if not (run.folder / "scores" / f"{cell.variant}.json").exists():
            continue
        results = ppcl.load(run.folder)
        variants = {cell.entry.label: cell.variant} if rows else {"teacher": "teacher", cell.entry.label: cell.variant}
        for label, variant in variants.items():
            rows[label], fails[label], captions = _drawn(run, results.pipeline(variant), prompts)
    if rows:
        plots.contact_sheet(path, rows, captions, fails)
    return bool(rows)


def _drawn(run: Run, pipeline: Any, prompts: int) -> tuple[list[Any], list[bool | None], list[str]]:
    """Return the pictures that a pipeline draws, whether each fails its prompt, and the prompts."""
    pipeline.set_progress_bar_config(disable=True)
    every = run.benchmark.prompts(run.family, run.config)
    numbers = [number for number in range(len(every)) if number % prompts < EACH]
    asked = [every[number] for number in numbers]
    given = [given_pictures(run, prompt) for prompt in asked]
    pictures = [one.picture for one in draw(run, pipeline, [prompt.text for prompt in asked], numbers, given)]
    right = [run.benchmark.fulfils(*pair) for pair in zip(asked, pictures, strict=True)]
    return pictures, [None if one is None else not one for one in right], [prompt.text for prompt in asked]
