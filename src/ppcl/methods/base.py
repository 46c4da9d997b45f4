"""The base class of methods: teacher and calibration data in, intervals out. Everything after is shared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from ppcl.artifacts.plan import Intervals
from ppcl.artifacts.probes import Probes
from ppcl.config import MethodConfig
from ppcl.data.batches import TrainingBatch
from ppcl.discovery import parse_settings
from ppcl.families.base import Family

# By stack and stream, a value per pair of blocks.
Curves = dict[str, dict[str, list[list[float | None]]]]


@dataclass
class Teacher:
    """The teacher as a method sees it. `calibration` starts a pass over the calibration set; `progress` shows one."""

    family: Family
    transformer: nn.Module
    calibration: Callable[[], Iterable[TrainingBatch]]
    probes: Callable[[], Probes]
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items


@dataclass
class Detection:
    """`scores` is written into the plan; `curves[stack][stream]` is `[M][M]`, None below the diagonal."""

    intervals: Intervals
    scores: dict[str, Any] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)


@dataclass
class NoSettings:
    """Settings of a method that needs no keys of its own."""


class Method(ABC):
    """One way to choose intervals. It is found by the name of its file, which is `method.rule`.

    `settings_class`: a dataclass of keys that only this method has, given under `method.settings`.
    `needs_probes`: whether it reads the linear probes that `stages=[probe]` fits.
    """

    settings_class: ClassVar[type[Any]] = NoSettings
    needs_probes: ClassVar[bool] = False

    def __init__(self, config: MethodConfig) -> None:
        self.config = config
        self.settings = parse_settings(self.settings_class, config.settings, "method.settings")

    @classmethod  # noqa: B027 - most have nothing more to check
    def check(cls, config: MethodConfig) -> None:
        """Raise `UsageError` for a configuration that means nothing to this method."""

    @abstractmethod
    def detect(self, teacher: Teacher) -> Detection:
        """Look at the teacher and name the intervals."""
