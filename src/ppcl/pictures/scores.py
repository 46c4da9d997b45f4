"""Scores of drawn pictures: what they were made from, and how variants compare with the teacher."""

from __future__ import annotations

from collections.abc import Sequence

from ppcl.artifacts.headers import Header, is_current
from ppcl.artifacts.scores import ComparedRow, ScoreRow
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.pictures.images import image_folder, prompts_of, variant_header
from ppcl.variants.plugs import Plugs
from ppcl.variants.variants import Variant


def score_headers(run: Run, variants: list[Variant], plugs: Plugs) -> dict[str, Header]:
    """Return the header of each variant's scores, made from just the pictures this configuration draws."""
    prompts, headers = prompts_of(run), {}
    for variant in variants:
        images = variant_header(run, variant, plugs, prompts)
        manifest = image_folder(run, variant.name) / "manifest.json"
        if not is_current(manifest, images):
            raise UsageError(f"{manifest} does not exist: run 'stages=[generate]' for variant {variant.name} first.")
        headers[variant.name] = Header("ppcl.scores", {"images": images.fingerprint})
    return headers


def compare(rows: Sequence[ScoreRow]) -> list[ComparedRow]:
    """Every variant's row beside the teacher's."""
    teacher = next((row for row in rows if row.name == "teacher"), None)
    if teacher is None:
        raise UsageError("a comparison needs the teacher: add it to generate.variants.")
    return [ComparedRow.beside(teacher, row) for row in rows]
