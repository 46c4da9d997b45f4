"""Scores of variants on disk: `scores/<variant>.json`. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.headers import Header
from ppcl.errors import UsageError

NOISE_LEVELS = 4  # of which the velocity error is told separately


@dataclass(frozen=True)
class Scores:
    """A score per category, and one for all.

    `interval` is half the width of the 95% confidence interval of `overall`, None where it is not known.
    """

    categories: dict[str, float]
    overall: float
    interval: float | None = field(default=None, compare=False)

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
        return cls(listed, float(np.mean(list(means.values()))), half_width(list(groups.values())))

    @classmethod
    def from_json(cls, content: Mapping[str, float]) -> Scores:
        """Make scores of one table with `overall` among the categories, as files hold it."""
        return cls({name: value for name, value in content.items() if name != "overall"}, content["overall"])

    def to_json(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.categories.items()} | {"overall": float(self.overall)}


def half_width(groups: Sequence[Sequence[float]]) -> float | None:
    """Return half the width of the 95% confidence interval of a mean of group means, by the normal approximation.

    That is 1.96 sqrt(sum of s_k^2 / n_k) / K for K groups of n_k values with the variance s_k^2. Where all values are 0
    or 1, each group is counted with one success and one failure more: a group of equal values would be certain
    otherwise. None where a group of other values has only one.
    """
    if not groups:
        return None
    if all(value in (0, 1) for group in groups for value in group):
        shares = [((sum(group) + 1) / (len(group) + 2), len(group) + 2) for group in groups]
        variances = [share * (1 - share) / count for share, count in shares]
    elif min(map(len, groups)) > 1:
        variances = [float(np.var(group, ddof=1)) / len(group) for group in groups]
    else:
        return None
    return 1.96 * float(np.sqrt(sum(variances))) / len(groups)


@dataclass(frozen=True)
class Likeness:
    """How near pictures are to the teacher's: PSNR in dB, and SSIM, 1 for equal pictures and near 0 for unlike ones."""

    psnr: float
    ssim: float

    @classmethod
    def mean(cls, several: Sequence[Likeness]) -> Likeness:
        return cls(float(np.mean([one.psnr for one in several])), float(np.mean([one.ssim for one in several])))


@dataclass(frozen=True)
class NoiseLevel:
    """The velocity error on the held-out samples whose noise level sigma is from `low` to `high`."""

    low: float
    high: float
    velocity_error: float

    @classmethod
    def grouped(cls, samples: Iterable[tuple[float, float, float]]) -> list[NoiseLevel]:
        """Return the error at `NOISE_LEVELS` levels with equally many of the samples each, from little noise to much.

        `samples`: sigma, ||v - v_T||^2 and ||v_T||^2 of each.
        """
        groups = [group for group in np.array_split(sorted(samples), NOISE_LEVELS) if len(group)]
        return [cls(*map(float, (each[0, 0], each[-1, 0], each[:, 1].sum() / each[:, 2].sum()))) for each in groups]


@dataclass(frozen=True)
class Fidelity:
    """How near a variant is to the teacher: each of its pictures, and its velocity by noise level.

    `noise_levels` is empty where no velocity can be measured, without data.
    """

    pictures: list[Likeness]
    noise_levels: list[NoiseLevel]

    @property
    def mean(self) -> Likeness:
        """The mean over all pictures."""
        return Likeness.mean(self.pictures)

    def prompts(self, images_per_prompt: int) -> list[Likeness]:
        """Return the mean over each prompt's pictures."""
        starts = range(0, len(self.pictures), images_per_prompt)
        return [Likeness.mean(self.pictures[start : start + images_per_prompt]) for start in starts]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Fidelity:
        pictures = [Likeness(**numbers) for numbers in content["pictures"]]
        return cls(pictures, [NoiseLevel(**numbers) for numbers in content["noise_levels"]])

    def to_json(self) -> dict[str, Any]:
        return asdict(self.mean) | asdict(self)


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """A variant's scores, its distance to the teacher, its parameters, and the cost of its denoising step.

    `scores` is None without a benchmark. `score_interval` is half the width of the 95% confidence interval of the
    overall score. `velocity_error` is ||v - v_T||^2 / ||v_T||^2 on held-out data. `latent_distance` is
    ||z - z_T||^2 / ||z_T - mean(z_T)||^2 of the final latents from equal seeds: 0 for the same pictures, about 2 for
    unrelated ones. Each of the three, and `fidelity`, is None where it was not measured. The teacher has no `fidelity`.

    `teacher_share` is the share of denoising steps that the teacher runs in place of a pruned variant, None without
    `generate.teacher_above`. With it, `latency_ms` is the mean over the steps of a picture, and parameters and memory
    are those of both models.

    `lower_is_better` says so of the scores, as of a distance; usually higher ones are better.
    """

    name: str
    num_layers: int
    params: int
    latency_ms: float
    peak_memory_mb: float
    scores: Scores | None
    students: list[str]
    projectors: list[str]
    removed: list[str]
    score_interval: float | None = None
    velocity_error: float | None = None
    latent_distance: float | None = None
    teacher_share: float | None = None
    fidelity: Fidelity | None = None
    lower_is_better: bool = False

    @property
    def psnr(self) -> float | None:
        """The mean PSNR of all pictures in dB, None where it was not measured."""
        return None if self.fidelity is None else self.fidelity.mean.psnr

    @property
    def ssim(self) -> float | None:
        """The mean SSIM of all pictures, None where it was not measured."""
        return None if self.fidelity is None else self.fidelity.mean.ssim

    def save(self, path: Path, header: Header, measured_with: Mapping[str, Any]) -> None:
        """Write the row. `measured_with`: what the velocity error and the fidelity depend on besides the header."""
        content = header.to_json() | self.to_json() | {"measured_with": dict(measured_with)}
        for key in ("teacher_share", "fidelity", "lower_is_better"):
            if content[key] in (None, False):
                del content[key]  # most rows have none, and older records are without the key
        write_json(path, content)

    @classmethod
    def load(cls, path: Path) -> ScoreRow:
        content = read_json(path, "The scores", "evaluate")
        try:
            later = ("score_interval", "velocity_error", "latent_distance", "teacher_share", "fidelity")
            values: dict[str, Any] = {  # older records are without some keys
                key: content.get(key) if key in later else content[key]
                for key in cls.__dataclass_fields__
                if key != "lower_is_better"
            } | {"lower_is_better": bool(content.get("lower_is_better"))}
            for key, kind in (("scores", Scores), ("fidelity", Fidelity)):
                if values[key] is not None:
                    values[key] = kind.from_json(values[key])
            row = cls(**values)
            if row._is_sound():
                return row
        except (KeyError, TypeError, AttributeError):
            pass
        raise UsageError(f"{path} holds no scores; delete it and run 'stages=[evaluate]' again.")

    def _is_sound(self) -> bool:
        """Return whether every value is of its kind; a file that was edited by hand may hold others."""
        scores = [] if self.scores is None else [self.scores.overall, *self.scores.categories.values()]
        further = [self.score_interval, self.velocity_error, self.latent_distance, self.teacher_share]
        if self.fidelity is not None:
            further += [value for picture in self.fidelity.pictures for value in astuple(picture)]
            further += [value for level in self.fidelity.noise_levels for value in astuple(level)]
        positive = [self.num_layers, self.params, self.latency_ms]
        numbers = [*positive, self.peak_memory_mb, *scores, *(value for value in further if value is not None)]
        lists = [self.students, self.projectors, self.removed]
        return (
            isinstance(self.name, str)
            and all(isinstance(value, (int, float)) for value in numbers)
            and min(positive) > 0
            and all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists)
        )

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {
            "scores": None if self.scores is None else self.scores.to_json(),
            "fidelity": None if self.fidelity is None else self.fidelity.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class ComparedRow(ScoreRow):
    """A variant beside the teacher.

    `drop_percent` is the relative loss of the overall score (R. in the paper), or its relative increase where lower is
    better; None without a benchmark.
    """

    params_ratio: float
    drop_percent: float | None

    @classmethod
    def beside(cls, teacher: ScoreRow, row: ScoreRow) -> ComparedRow:
        drop = None
        if teacher.scores is not None and row.scores is not None:
            best = teacher.scores.overall
            # A teacher that scores nothing has nothing to lose; JSON has no NaN.
            lost = row.scores.overall - best if row.lower_is_better else best - row.scores.overall
            drop = 100 * lost / abs(best) if best else 0.0
        return cls(**vars(row), params_ratio=row.params / teacher.params, drop_percent=drop)
