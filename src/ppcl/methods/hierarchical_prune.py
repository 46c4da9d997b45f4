"""HierarchicalPrune: remove late blocks first, if the model's output does not need them (arXiv 2508.04663)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ppcl.families.base import Family
from ppcl.methods.base import Teacher
from ppcl.methods.removal import Ranking, removal_means
from ppcl.options import option
from ppcl.taps import BlockKey


@dataclass
class Settings:
    """`position_power`: the power of the position's weight; 0 for none, a higher one removes late blocks sooner."""

    position_power: float = option(1.0, least=0, most=100)


def _relative_error(whole: Tensor, without: Tensor) -> Tensor:
    error, size = ((part.double().square().sum(dim=(1, 2))) for part in (without - whole, whole))
    return error / size


class HierarchicalPrune(Ranking):
    """Ranks blocks by the error of their single removal times a weight of their position, and removes the lowest first.

    The error is ||v - v_without||^2 / ||v||^2 of the predicted velocity v, averaged over samples. It stands for the
    drop of the paper's metric. The weight is (1 - position) ** `position_power`, where the position runs from 0 to 1
    over the blocks of all stacks in order of execution.

    The paper's formula and its text contradict each other in the sign of the weight. This follows the text: late blocks
    go first.
    """

    settings_class = Settings
    score_name = "weighted_velocity_error"

    def passes(self, family: Family, layers: Mapping[str, int]) -> float:
        return float(sum(layers.values()))  # the whole teacher, and each block's removal

    def scores(self, teacher: Teacher) -> dict[BlockKey, float]:
        errors = removal_means(self, teacher, _relative_error)
        last = max(1, len(errors) - 1)
        return {
            key: error * (1 - place / last) ** self.settings.position_power
            for place, (key, error) in enumerate(errors.items())
        }
