"""Rows of scores, made by hand."""

from __future__ import annotations

from typing import Any

from ppcl.artifacts.scores import ComparedRow, ScoreRow, Scores

PARAMS = {"teacher": 20_430_401_088, "removed": 15_000_000_000, "ppcl-depth": 15_000_000_000, "ppcl-finetuned": 10**10}


def compared(scores: dict[str, float | None], **measured: Any) -> list[ComparedRow]:
    """A row per variant of `scores`, whose teacher comes first; a score of None is no score. `measured` is of all."""
    rows = [
        ScoreRow(
            name=name,
            num_layers=60,
            params=PARAMS[name],
            latency_ms=1234.5,
            peak_memory_mb=40_862.1,
            scores=None if score is None else Scores({"two_object": score / 2}, score),
            students=["transformer_blocks.3-5"] if name == "ppcl-finetuned" else [],
            projectors=["transformer_blocks.7.text"] if name == "ppcl-finetuned" else [],
            removed=["transformer_blocks.3-5"] if name == "removed" else [],
            **measured,
        )
        for name, score in scores.items()
    ]
    return [ComparedRow.beside(rows[0], row) for row in rows]


SCORES = {"teacher": 0.878, "removed": 0.878, "ppcl-depth": 0.878, "ppcl-finetuned": 0.0}
MEASURED = {"score_interval": 0.0312, "velocity_error": 0.01234, "latent_distance": 0.5678}
