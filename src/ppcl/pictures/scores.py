"""Scores of drawn pictures: what they were made from, and how variants compare with the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ppcl.artifacts.headers import Header, is_current
from ppcl.artifacts.scores import ComparedRow, ScoreRow
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.pictures.images import drawings
from ppcl.variants.plugs import Plugs
from ppcl.variants.variants import Variant, variants_of


def score_headers(run: Run, variants: list[Variant], plugs: Plugs) -> dict[str, Header]:
    """Return the header of each variant's scores, made from just the pictures this configuration draws."""
    headers = {}
    for drawing in drawings(run, variants, plugs):
        name = drawing.variant.name
        if not drawing.is_complete:
            manifest = drawing.folder / "manifest.json"
            raise UsageError(f"{manifest} does not exist: run 'stages=[generate]' for variant {name} first.")
        headers[name] = Header("ppcl.scores", {"images": drawing.header.fingerprint})
    return headers


def score_record(run: Run, variant: str) -> Path:
    """Where the scores of a variant's pictures lie: under the name of the folder that holds the pictures."""
    return run.scores_folder / f"{run.image_folders[variant].name}.json"


def read_rows(run: Run, names: list[str] | None = None) -> list[ComparedRow]:
    """Return the scores of the configured variants, or those named; raises `UsageError` where some are missing."""
    rows = []
    for name, header in score_headers(run, *variants_of(run, names)).items():
        record = score_record(run, name)
        if not is_current(record, header):
            raise UsageError(f"{record} does not exist: run 'stages=[evaluate]' first.")
        rows.append(ScoreRow.load(record))
    return compare(rows)


def compare(rows: Sequence[ScoreRow]) -> list[ComparedRow]:
    """Every variant's row beside the teacher's."""
    teacher = next((row for row in rows if row.name == "teacher"), None)
    if teacher is None:
        raise UsageError("a comparison needs the teacher: add it to generate.variants.")
    return [ComparedRow.beside(teacher, row) for row in rows]
