"""The paper's baseline: remove the blocks whose single removal changes the model's output least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from ppcl.families.base import Family
from ppcl.methods.base import Teacher
from ppcl.methods.removal import Ranking, removal_means
from ppcl.ops.cka import centre, cka
from ppcl.taps import BlockKey


@dataclass
class Settings:
    """`normalise`: whether each token's features are also scaled to norm 1 after centring (the paper's appendix)."""

    normalise: bool = False


class CkaSensitivity(Ranking):
    """Ranks blocks by CKA(output, output without the block) and removes those of the highest first."""

    settings_class = Settings
    reads = (*Ranking.reads, "debiased")
    score_name = "cka_without"
    highest_first = True

    def passes(self, family: Family, layers: Mapping[str, int]) -> float:
        return float(sum(layers.values()))  # the whole teacher, and each block's removal

    def scores(self, teacher: Teacher) -> dict[BlockKey, float]:
        def similarity(whole: Tensor, without: Tensor) -> Tensor:
            return cka(self._features(whole), self._features(without), debiased=self.config.debiased)

        return removal_means(self, teacher, similarity)

    def _features(self, tokens: Tensor) -> Tensor:
        """Return predictions `[B, tokens, C]` as the CKA takes them."""
        centred = centre(tokens)
        return normalize(centred, dim=-1) if self.settings.normalise else centred
