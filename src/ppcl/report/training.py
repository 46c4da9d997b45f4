"""The report's section on trainings: sample pictures that were drawn on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppcl.artifacts.samples import Samples, load_sample, sample_path
from ppcl.context import Run
from ppcl.report.made import link
from ppcl.report.sheets import cell
from ppcl.report.text import counted


def training_sections(
    run: Run, drawn: Mapping[str, Sequence[tuple[Path, Samples]]], largest: int
) -> list[dict[str, Any]]:
    """Return the sample pictures of each training as the template expects them: a row for each prompt.

    `drawn`: folder and record of the trainings of each stage. Pictures are at most `largest` pixels per side.
    """
    return [
        {
            "stage": stage,
            "href": link(run, folder),
            "remark": f"{_trained(record)}, {counted(record.picture_steps, 'denoising step')} a picture",
            "columns": [_column(step, record.num_steps) for step in (None, *record.steps)],
            "rows": _rows(folder, record, largest),
        }
        for stage, trainings in drawn.items()
        for folder, record in trainings
    ]


def _trained(record: Samples) -> str:
    return counted(len(record.parts), "part") if len(record.parts) > 1 else record.parts[0]


def _column(step: int | None, num_steps: int) -> str:
    """Return the heading of the pictures that were drawn after `step`, or by the teacher."""
    if step is None:
        return "teacher"
    return {0: "start", num_steps: f"end, step {step:,}"}.get(step, f"step {step:,}")


def _rows(folder: Path, record: Samples, largest: int) -> list[dict[str, Any]]:
    found = []
    for number, caption in enumerate(record.prompts):
        pictures = [load_sample(sample_path(folder, number, step)) for step in (None, *record.steps)]
        found.append({"caption": caption, "pictures": [cell(picture, caption, largest) for picture in pictures]})
    return found
