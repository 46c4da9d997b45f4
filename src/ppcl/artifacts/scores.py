"""Scores of variants on disk: `scores/<variant>.json`. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.headers import Header
from ppcl.errors import UsageError


@dataclass(frozen=True)
class Scores:
    """A score per category, and one for all; higher is better."""

    categories: dict[str, float]
    overall: float

    @classmethod
    def by_category(cls, categories: Iterable[str | None], values: Iterable[float]) -> Scores:
        """The mean of each category's values, and the mean of these means.

        Values of category None count as those of one more category, which is not listed.
        """
        groups: dict[str | None, list[float]] = {}
        for category, value in zip(categories, values, strict=True):
            groups.setdefault(category, []).append(value)
        means = {category: float(np.mean(group)) for category, group in groups.items()}
        listed = {category: mean for category, mean in means.items() if category is not None}
        return cls(listed, float(np.mean(list(means.values()))))

    @classmethod
    def from_json(cls, content: Mapping[str, float]) -> Scores:
        """Make scores of one table with `overall` among the categories, as files hold it."""
        return cls({name: value for name, value in content.items() if name != "overall"}, content["overall"])

    def to_json(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.categories.items()} | {"overall": float(self.overall)}


@dataclass(frozen=True)
class ScoreRow:
    """A variant's scores, its parameters, and the cost of its denoising step."""

    name: str
    num_layers: int
    params: int
    latency_ms: float
    peak_memory_mb: float
    scores: Scores
    students: list[str]
    projectors: list[str]
    removed: list[str]

    def save(self, path: Path, header: Header) -> None:
        write_json(path, header.to_json() | self.to_json())

    @classmethod
    def load(cls, path: Path) -> ScoreRow:
        content = read_json(path, "The scores")
        try:
            values = {key: content[key] for key in cls.__dataclass_fields__}
            return cls(**values | {"scores": Scores.from_json(content["scores"])})
        except (KeyError, TypeError, AttributeError):
            raise UsageError(f"{path} holds no scores; delete it and run 'stages=[evaluate]' again.") from None

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"scores": self.scores.to_json()}


@dataclass(frozen=True)
class ComparedRow(ScoreRow):
    """A variant beside the teacher; `drop_percent` is R., the relative loss of the overall score."""

    params_ratio: float
    drop_percent: float

    @classmethod
    def beside(cls, teacher: ScoreRow, row: ScoreRow) -> ComparedRow:
        best = teacher.scores.overall
        # A teacher that scores nothing has nothing to lose; JSON has no NaN.
        drop = 100 * (best - row.scores.overall) / abs(best) if best else 0.0
        return cls(**vars(row), params_ratio=row.params / teacher.params, drop_percent=drop)
