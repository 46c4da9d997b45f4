"""Checks that the losses of fine-tuning, and what it trains, fit together."""

from __future__ import annotations

from ppcl.artifacts.plan import Intervals
from ppcl.config import Config, FinetuneConfig
from ppcl.errors import UsageError


def check_finetune(config: Config, intervals: Intervals | None) -> None:
    """Raise `UsageError` for losses that train no output, for keys without effect, and for nothing to train after.

    `intervals`: those that are given; None if they are to be detected.
    """
    finetune = config.finetune
    if finetune.output_weight == finetune.flow_weight == 0:
        raise UsageError(
            "finetune.output_weight and finetune.flow_weight are both 0, so no loss trains the output: set one."
        )
    if "finetune" not in config.stages:
        return
    _check_features(finetune)
    if finetune.trains == "all":
        return
    asked = f"finetune.trains={finetune.trains}"
    if finetune.lora_rank:
        raise UsageError(
            f"{asked} does not go with finetune.lora_rank={finetune.lora_rank}, which adds a LoRA to every block: "
            "leave one of them out."
        )
    if intervals is not None and not any(intervals.values()):
        raise UsageError(f"{asked} needs a removed block, and no interval is given: name one, or use all.")


def _check_features(finetune: FinetuneConfig) -> None:
    """Raise `UsageError` for settings of the feature loss that have no effect."""
    kind, weight = finetune.feature_loss, finetune.feature_weight
    if not weight and finetune.feature_decay:
        raise UsageError(
            f"finetune.feature_decay=true has no effect with finetune.feature_weight={weight:g}: set a weight above 0, "
            "or add finetune.feature_decay=false and finetune.feature_loss=relative."
        )
    if not weight and kind != "relative":
        raise UsageError(
            f"finetune.feature_loss={kind} has no effect with finetune.feature_weight={weight:g}: set a weight above "
            "0, or add finetune.feature_loss=relative."
        )
    if kind != "masked" and finetune.mask_sigmas != FinetuneConfig.mask_sigmas:
        raise UsageError(
            f"finetune.mask_sigmas={finetune.mask_sigmas:g} has no effect with finetune.feature_loss={kind}: add "
            "finetune.feature_loss=masked, or leave it out."
        )
