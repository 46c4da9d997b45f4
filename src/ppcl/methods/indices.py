"""Removal by indices: keep or remove the blocks that are named, such as those of a published pruned model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ppcl.artifacts.plan import Intervals
from ppcl.config import MethodConfig
from ppcl.errors import UsageError
from ppcl.families.base import Family
from ppcl.families.facts import FamilyFacts
from ppcl.layers import removable
from ppcl.methods.base import Detection, Method, Teacher
from ppcl.methods.removal import runs_to_intervals
from ppcl.taps import stack_of


@dataclass
class Settings:
    """The blocks of the model, named by one of the two keys.

    `keep`: those that stay. `remove`: those that go. Each is a list of indices, or a mapping from a stack to such a
    list. A stack that the mapping lacks stays whole.
    """

    keep: Any = None
    remove: Any = None


def _lists(key: str, value: Any, layers: Mapping[str, int]) -> dict[str, list[int]]:
    """Return the named indices by stack; `UsageError` if they are not written as such, or if there is no such block."""
    if isinstance(value, list):
        if len(layers) > 1:
            raise UsageError(
                f"{key}={value} fits one stack, and the model has {', '.join(layers)}: write {key}={{STACK:[...]}}."
            )
        value = {next(iter(layers)): value}
    if not isinstance(value, Mapping) or not all(isinstance(found, list) for found in value.values()):
        raise UsageError(f"{key}={value} is no list of block indices: write such as {key}=[2,4,6].")
    for stack, found in value.items():
        if stack not in layers:
            raise UsageError(f"{key}: the model has no block stack {stack} (it has {', '.join(layers)}).")
        for index in found:
            if type(index) is not int or not 0 <= index < layers[stack]:
                raise UsageError(f"{key}: {index} is no block of {stack}, whose blocks are 0 to {layers[stack] - 1}.")
    return dict(value)


class Indices(Method):
    """Removes the blocks that `method.settings` names. It takes no size, and no calibration."""

    settings_class = Settings
    reads = ("start", "end")

    @classmethod
    def check(cls, config: MethodConfig) -> None:
        super().check(config)
        if (config.settings.get("keep") is None) == (config.settings.get("remove") is None):
            raise UsageError(
                "method.rule=indices needs either method.settings.keep or method.settings.remove: give one list of "
                "block indices."
            )

    def check_model(self, family: Family, layers: Mapping[str, int]) -> None:
        self._intervals(family.facts, layers)

    def detect(self, teacher: Teacher) -> Detection:
        layers = {stack: len(stack_of(teacher.transformer, stack)) for stack in teacher.family.stacks}
        return Detection(self._intervals(teacher.family.facts, layers))

    def _intervals(self, facts: FamilyFacts, layers: Mapping[str, int]) -> Intervals:
        """Return the intervals of the named blocks; `UsageError` if one of them has to stay."""
        kept = self.settings.keep is not None
        key = f"method.settings.{'keep' if kept else 'remove'}"
        named = _lists(key, self.settings.keep if kept else self.settings.remove, layers)
        allowed = {
            *removable(
                layers,
                start=max(facts.first_block, self.config.start),
                end=self.config.end,
                last=facts.last_blocks,
            )
        }
        intervals: Intervals = {stack: [] for stack in layers}
        for stack, indices in named.items():
            removed = set(range(layers[stack])) - {*indices} if kept else {*indices}
            for index in sorted(removed):
                if (stack, index) not in allowed:
                    remedy = "add it" if kept else "leave it out"
                    raise UsageError(f"{key} removes block {index} of {stack}, which has to stay: {remedy}.")
            intervals[stack] = runs_to_intervals(removed)
        if not any(intervals.values()):
            raise UsageError(f"{key} removes no block: name {'fewer' if kept else 'some'}.")
        return intervals
