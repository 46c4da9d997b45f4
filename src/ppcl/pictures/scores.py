"""Headers and files of the scores of drawn pictures, and the comparison of all variants with the teacher."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from ppcl.artifacts.headers import Header, is_current
from ppcl.artifacts.scores import ComparedRow, ScoreRow
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.pictures.images import drawings
from ppcl.variants.plugs import Plugs
from ppcl.variants.variants import Variant, variants_of


def score_headers(run: Run, variants: list[Variant], plugs: Plugs) -> dict[str, Header]:
    """Return the header of each variant's scores, which names the pictures that this configuration draws.

    Raises `UsageError` if some of these pictures do not exist.
    """
    headers = {}
    for drawing in drawings(run, variants, plugs):
        name = drawing.variant.name
        if not drawing.is_complete:
            manifest = drawing.folder / "manifest.json"
            lacking = f"{drawing.folder} lacks pictures" if manifest.exists() else f"{manifest} does not exist"
            raise UsageError(f"{lacking}: run 'stages=[generate]' for variant {name} first.")
        drawing.check()
        headers[name] = Header("ppcl.scores", {"images": drawing.header.fingerprint})
    return headers


def score_record(run: Run, variant: str) -> Path:
    """Return the file of the scores of a variant, which is named after the folder of its pictures."""
    return run.scores_folder / f"{run.image_folders[variant].name}.json"


def read_rows(run: Run, names: list[str] | None = None) -> list[ComparedRow]:
    """Return the scores of the variants `names`, by default those of `generate.variants`, compared with the teacher's.

    Raises `UsageError` if some are missing or outdated, or if the teacher is not among them.
    """
    rows = []
    for name, header in score_headers(run, *variants_of(run, names)).items():
        record = score_record(run, name)
        if not is_current(record, header):
            raise UsageError(f"{record} does not exist: run 'stages=[evaluate]' first.")
        rows.append(ScoreRow.load(record))
    return compare(rows)


def compare(rows: Sequence[ScoreRow]) -> list[ComparedRow]:
    """Return each variant's scores with its drop against the teacher's; raises `UsageError` without a teacher."""
    check_teacher([row.name for row in rows])
    teacher = next(row for row in rows if row.name == "teacher")
    return [ComparedRow.beside(teacher, row) for row in rows]


def check_teacher(names: Collection[str]) -> None:
    """Raise `UsageError` if the variants `names` are without the teacher."""
    if "teacher" not in names:
        raise UsageError(
            "generate.variants lacks the teacher, which all variants are compared with: add teacher to it."
        )
