"""A model that is the teacher at high noise levels and a pruned model at all others."""

from __future__ import annotations

from typing import Any

from torch import nn

from ppcl.errors import UsageError
from ppcl.families.base import Family


class ByNoiseLevel(nn.Module):
    """Runs `teacher` at noise levels sigma > `above`, and `pruned` at all others. Both stay in memory.

    It takes the place of a pipeline's transformer: both models take the same arguments, and what else a pipeline reads,
    such as the config, is the teacher's. Blocks that the two models share are in memory once. It cannot be saved.

    `calls` has the number of forwards of each model so far.
    """

    def __init__(self, family: Family, teacher: nn.Module, pruned: nn.Module, above: float) -> None:
        super().__init__()
        self.family = family
        self.above = above
        self.teacher, self.pruned = teacher, pruned
        self.calls = {"teacher": 0, "pruned": 0}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("teacher"), name)

    @property
    def models(self) -> tuple[nn.Module, nn.Module]:
        """Teacher and pruned model."""
        return self.teacher, self.pruned

    @property
    def teacher_share(self) -> float:
        """The share of the forwards so far that the teacher ran."""
        return self.calls["teacher"] / sum(self.calls.values())

    def num_parameters(self) -> int:
        """Return the number of parameters in memory. Those that the models share are counted once."""
        shared = {*self.teacher.parameters()} & {*self.pruned.parameters()}
        counts: list[Any] = list(self.models)
        return sum(model.num_parameters() for model in counts) - sum(parameter.numel() for parameter in shared)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the model for the noise level of this call.

        Raises `UsageError` for noise levels outside of [0, 1], since the family then reads them wrongly, and for a
        batch with noise levels on both sides.
        """
        levels = self.family.noise_levels(kwargs)
        least, most = levels.min().item(), levels.max().item()
        if not 0 <= least <= most <= 1:
            raise UsageError(
                f"model.family={self.family.name} has a noise level of {most:g}, and it must lie in [0, 1]: its class "
                "needs a noise_levels of its own for generate.teacher_above."
            )
        if least <= self.above < most:
            raise UsageError(
                f"noise levels from {least:g} to {most:g} in one batch are on both sides of {self.above:g}: call the "
                "model for each of them."
            )
        side = "teacher" if least > self.above else "pruned"
        self.calls[side] += 1
        return getattr(self, side)(*args, **kwargs)
