"""Base class of methods, which choose the intervals of a teacher from calibration data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import nn

from ppcl.artifacts.decisions import Decisions
from ppcl.artifacts.plan import Intervals
from ppcl.artifacts.probes import Probes
from ppcl.config import MethodConfig
from ppcl.data.batches import TrainingBatch
from ppcl.discovery import parse_settings
from ppcl.errors import UsageError
from ppcl.families.base import Family
from ppcl.families.facts import FamilyFacts

# curves[stack][stream][u][k]: a value for each pair of blocks u <= k, None below the diagonal.
Curves = dict[str, dict[str, list[list[float | None]]]]


@dataclass
class Teacher:
    """Input of a method: the teacher, its family, and functions that supply data when called.

    `calibration`: starts a new pass over the calibration batches, or over this rank's share of them if the method
    `divides`. `probes`: returns the fitted linear probes.
    `progress(items, total)`: wraps an iterable to show a progress bar. `total`: how many items all ranks have.
    `gathered(value)`: returns the value of every rank. Every rank must call it, with a value to pickle.
    `train(module, steps, batch_size)`: trains a module on batches of the training data, for a method that `trains`.
    `precision`: of that training, `32-true` or `bf16-mixed`.
    `say(text)`: prints a line, on several ranks once.
    """

    family: Family
    transformer: nn.Module
    calibration: Callable[[], Iterable[TrainingBatch]]
    probes: Callable[[], Probes]
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items
    gathered: Callable[[Any], list[Any]] = lambda value: [value]
    train: Callable[[Any, int, int], None] | None = None
    precision: str = "32-true"
    say: Callable[[str], None] = lambda text: None


@dataclass
class Detection:
    """Result of a method: the intervals, and the numbers they were chosen by.

    `scores`: saved in the plan. `curves[stack][stream]`: `[M][M]` for the M blocks of a stack, shown in the report.
    `decisions`: how the choice of blocks developed, if it was learned.
    """

    intervals: Intervals
    scores: dict[str, Any] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    decisions: Decisions | None = None


@dataclass
class NoSettings:
    """Settings of a method without keys of its own."""


class Method(ABC):
    """One way to choose intervals. `method.rule` selects it by the name of its file in `ppcl/methods`.

    `settings_class`: a dataclass of the keys that only this method has, which are set under `method.settings`.
    `reads`: the keys of `method` that choose the intervals. Others are refused where they are set. Empty: no key is.
    `needs_probes`: whether it reads the linear probes that `stages=[probe]` fits.
    `divides`: whether several ranks can share the calibration. `detect` then runs on every rank, with a part of it that
        may be empty, and merges by `teacher.gathered` what all have found. Otherwise rank 0 works alone.
    `compares_states`: whether it holds the states between all blocks at once (`ppcl.methods.similarity.state_cosines`),
        which is for estimates of memory.
    `trains`: whether it trains on the training data by `teacher.train`, for which it runs on every rank.
    """

    settings_class: ClassVar[type[Any]] = NoSettings
    reads: ClassVar[tuple[str, ...]] = ()
    needs_probes: ClassVar[bool] = False
    divides: ClassVar[bool] = False
    compares_states: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    def __init__(self, config: MethodConfig) -> None:
        self.config = config
        self.settings = parse_settings(self.settings_class, config.settings, "method.settings")

    @property
    def num_batches(self) -> int:
        """The number of calibration batches that all ranks have together."""
        return -(-self.config.num_samples // self.config.batch_size) * self.config.num_timesteps

    @property
    def num_held(self) -> int:
        """The number of calibration batches that it holds in memory at once, for estimates of memory; 0: one by one."""
        return 0

    @classmethod
    def check(cls, config: MethodConfig) -> None:
        """Raise `UsageError` if the configuration is not valid for this method. Called before the teacher is loaded.

        This one refuses a size, which only some methods can reach.
        """
        for key in ("num_remove", "params"):
            if (value := getattr(config, key)) is not None:
                raise UsageError(
                    f"method.{key}={value:g} has no effect with method.rule={config.rule}, which sets no size: add "
                    f"method.{key}=null, or use a method that removes blocks, such as method=shortgpt."
                )

    def check_model(self, family: Family, layers: Mapping[str, int]) -> None:  # noqa: B027 - most need no check
        """Raise `UsageError` if the configured model does not fit. Called before the teacher is loaded.

        `family`: with the model's `arch`. `layers`: the number of blocks by stack.
        """

    def passes(self, family: Family, layers: Mapping[str, int]) -> float:
        """Return how many forwards of the whole teacher a calibration batch takes at most, for estimates of time.

        Of models without some blocks it counts the share that is left. The arguments are those of `check_model`.
        """
        return 1.0

    def check_keys(self, facts: FamilyFacts) -> None:
        """Raise `UsageError` for a key of `method` that is set and has no effect on a model of this family.

        Called at the start of a command that detects, but not where a plan is reused, which may be older than this
        check. The size of the calibration is never refused, so that one command can set it for several methods.
        """
        config, usual = self.config, MethodConfig()
        of_all = {"name", "rule", "settings", "num_samples", "num_timesteps", "batch_size"}
        for item in fields(config) if self.reads else ():
            value, default = getattr(config, item.name), getattr(usual, item.name)
            if item.name not in {*of_all, *self.reads} and value != default:
                raise UsageError(
                    f"method.{item.name}={value} has no effect with method.rule={config.rule}, which reads "
                    f"{', '.join(self.reads)}: leave it out, or add method.{item.name}={default}, its default."
                )
        if config.stream not in (*facts.streams, "mean"):
            raise UsageError(
                f"method.stream={config.stream}: blocks of model.family={facts.name} have no {config.stream} stream; "
                f"use mean, or {' or '.join(facts.streams)}."
            )

    @abstractmethod
    def detect(self, teacher: Teacher) -> Detection:
        """Choose the intervals of `teacher`."""
