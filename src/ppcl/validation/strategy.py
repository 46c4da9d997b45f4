"""In how many processes and in which precision things are trained, and whether what is asked for goes together."""

from __future__ import annotations

from ppcl.config import Config
from ppcl.errors import SaidElsewhere, UsageError
from ppcl.launch import is_first, launched, rank
from ppcl.stages import TRAINED

PRECISIONS = ("32-true", "bf16-mixed")


def resolve_precision(config: Config) -> str:
    """`trainer.precision`, by default what goes with the teacher's dtype; `UsageError` for what does not."""
    asked, dtype = config.trainer.precision, config.model.dtype
    fitting = "32-true" if dtype == "float32" else "bf16-mixed"
    if asked is None:
        return fitting
    if asked not in PRECISIONS:
        raise UsageError(
            f"trainer.precision={asked} is not one of {', '.join(PRECISIONS)}: what learns is held in float32."
        )
    if asked == "32-true" and fitting != asked:
        raise UsageError(
            f"trainer.precision=32-true does not go with model.dtype={dtype}, in which the teacher's activations are: "
            "leave it out, or set model.dtype=float32."
        )
    return asked


def check_strategy(config: Config) -> None:
    """`UsageError` where launcher, `strategy` and stages do not go together; all ranks find the same."""
    strategy, stages, (_, count) = config.strategy, config.stages, rank()
    if strategy.timeout_minutes <= 0:
        raise UsageError(f"strategy.timeout_minutes={strategy.timeout_minutes:g} must be above 0.")
    if strategy.cpu_offload and strategy.kind != "fsdp":
        raise UsageError(f"strategy.cpu_offload=true means nothing to strategy={strategy.kind}: use strategy=fsdp.")
    if strategy.kind == "single":
        trained = [stage for stage in (*TRAINED, "pretrain") if stage in stages]
        if trained and count > 1:
            _refuse_together(
                f"strategy=single trains {', '.join(trained)} in one process, and {count} were started: add "
                "strategy=ddp or strategy=fsdp, or start one."
            )
        return
    if not launched():
        raise UsageError(
            f"strategy={strategy.kind} takes processes that a launcher starts: "
            f"torchrun --nproc-per-node 2 -m ppcl ... strategy={strategy.kind}."
        )
    if config.model.streaming and strategy.kind == "fsdp":
        raise UsageError(
            "model.streaming=true reads a teacher from its files that strategy=fsdp shards among ranks: choose one, or "
            "strategy=ddp."
        )
    if "pretrain" in stages:
        raise UsageError(f"strategy={strategy.kind} does not go with 'stages=[pretrain]': use strategy=single.")
    sizes = {"depth": ("distill", config.distill), "width": ("distill", config.distill)}
    for stage, (group, settings) in (sizes | {"finetune": ("finetune", config.finetune)}).items():
        if stage in stages and settings.batch_size % count:
            size = settings.batch_size
            raise UsageError(
                f"{group}.batch_size={size} does not divide among {count} ranks: make it "
                f"{-(-size // count) * count}, the batch of all ranks together, or start another number of them."
            )
    if not set(TRAINED) & set(stages):
        return
    if "depth" not in stages:
        return
    if config.distill.from_boundaries:
        raise UsageError(
            f"distill.from_boundaries=true does not go with strategy={strategy.kind}: intervals train alone there, so "
            "give each rank its own distill.intervals with strategy=single."
        )
    if config.distill.mode == "sequential" and strategy.kind == "fsdp":
        raise UsageError(
            "distill.mode=sequential does not go with strategy=fsdp, which shards every student by itself: use "
            "strategy=ddp."
        )


def _refuse_together(sentence: str) -> None:
    """For ranks that have not met: the first one says it."""
    raise UsageError(sentence) if is_first() else SaidElsewhere()
