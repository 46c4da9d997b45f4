"""Checks and resolves the number of processes and the precision of training."""

from __future__ import annotations

from ppcl.config import Config, TrainingConfig
from ppcl.errors import SaidElsewhere, UsageError
from ppcl.launch import is_first, launched, rank
from ppcl.stages import STAGES, TRAINED

PRECISIONS = ("32-true", "bf16-mixed")


def resolve_precision(config: Config) -> str:
    """Return `trainer.precision`, or its default for the teacher's dtype; `UsageError` if the two do not fit.

    The default is `32-true` for a float32 teacher, otherwise `bf16-mixed`.
    """
    asked, dtype = config.trainer.precision, config.model.dtype
    fitting = "32-true" if dtype == "float32" else "bf16-mixed"
    if asked is None:
        return fitting
    if asked not in PRECISIONS:
        raise UsageError(
            f"trainer.precision={asked} is not one of {', '.join(PRECISIONS)}: trainable parameters stay in float32."
        )
    if asked == "32-true" and fitting != asked:
        raise UsageError(
            f"trainer.precision=32-true does not go with model.dtype={dtype}, the dtype of the teacher's activations: "
            "leave it out, or set model.dtype=float32."
        )
    return asked


def check_strategy(config: Config) -> None:
    """Raise `UsageError` if launcher, `strategy` and stages do not fit together. All ranks decide alike."""
    strategy, stages, (_, count) = config.strategy, config.stages, rank()
    _check_states(config)
    if strategy.cpu_offload and strategy.kind != "fsdp":
        raise UsageError(f"strategy.cpu_offload=true means nothing to strategy={strategy.kind}: use strategy=fsdp.")
    if strategy.kind == "single":
        _check_sizes(config, 1)
        # They need a process group, but for `cache`: its units are files of their own.
        shared = [name for name, stage in STAGES.items() if stage.ranks != "first" and name != "cache"] + ["pretrain"]
        shared = [stage for stage in shared if stage in stages]
        if shared and count > 1:
            _refuse_together(
                f"strategy=single runs {', '.join(shared)} in one process, and {count} were started: add "
                "strategy=ddp or strategy=fsdp, or start one."
            )
        return
    if not launched():
        raise UsageError(
            f"strategy={strategy.kind} needs a launcher that starts the processes: "
            f"torchrun --nproc-per-node 2 -m ppcl ... strategy={strategy.kind}."
        )
    if config.model.streaming and strategy.kind == "fsdp":
        raise UsageError(
            "model.streaming=true reads the teacher's blocks from disk, strategy=fsdp shards them over ranks: choose "
            "one of the two, or use strategy=ddp with streaming."
        )
    if "pretrain" in stages:
        raise UsageError(f"strategy={strategy.kind} does not go with 'stages=[pretrain]': use strategy=single.")
    _check_sizes(config, count)
    if not set(TRAINED) & set(stages):
        return
    if "depth" not in stages:
        return
    if config.distill.from_boundaries:
        raise UsageError(
            f"distill.from_boundaries=true does not go with strategy={strategy.kind}: its intervals train "
            "independently, so start processes with strategy=single and give each its own distill.intervals."
        )
    if config.distill.mode == "sequential" and strategy.kind == "fsdp":
        raise UsageError(
            "distill.mode=sequential does not go with strategy=fsdp, which shards every student by itself: use "
            "strategy=ddp."
        )


def _trained(config: Config) -> list[tuple[str, TrainingConfig]]:
    """Return name and settings of each group that a training of this command reads."""
    groups = [("distill", config.distill, {"depth", "width"}), ("finetune", config.finetune, {"finetune"})]
    if config.method.rule == "tinyfusion" and "batch_size" in config.method.settings:
        learned = TrainingConfig(batch_size=config.method.settings["batch_size"])
        groups.append(("method.settings", learned, {"detect"}))
    return [(name, settings) for name, settings, stages in groups if stages & {*config.stages}]


def _check_states(config: Config) -> None:
    """Raise `UsageError` if `optimizer_states` asks for what sharding or the betas do not allow."""
    for group, settings in _trained(config):
        asked = f"{group}.optimizer_states={settings.optimizer_states}"
        if settings.optimizer_states == "float32":
            continue
        if config.strategy.kind == "fsdp":
            raise UsageError(
                f"{asked} does not go with strategy=fsdp, which divides the states over the ranks instead: use "
                f"{group}.optimizer_states=float32."
            )
        beta = max(settings.beta1, settings.beta2)
        if beta > 0.99:
            raise UsageError(
                f"{asked} would round away what a step changes with a beta of {beta:g}: use {group}.beta1 and "
                f"{group}.beta2 of at most 0.99, or float32."
            )


def _check_sizes(config: Config, ranks: int) -> None:
    """Raise `UsageError` if a batch does not divide among ranks, and each rank's rows by `accumulate`."""
    for group, settings in _trained(config):
        size, parts = settings.batch_size, settings.accumulate
        if size % ranks:
            raise UsageError(
                f"{group}.batch_size={size} does not divide among {ranks} ranks: make it "
                f"{-(-size // ranks) * ranks}, the batch of all ranks together, or start another number of them."
            )
        if size // ranks % parts:
            whose = f"the {size // ranks} samples of each of {ranks} ranks" if ranks > 1 else "the samples of a step"
            raise UsageError(
                f"{group}.accumulate={parts} does not divide {whose} ({group}.batch_size={size}): choose one of "
                f"{', '.join(str(n) for n in range(1, size // ranks + 1) if not size // ranks % n)}."
            )
    if config.distill.accumulate > 1 and config.distill.from_boundaries and "depth" in config.stages:
        raise UsageError(
            f"distill.accumulate={config.distill.accumulate} does not go with distill.from_boundaries=true, whose "
            "batches are read as they were stored: store them with a smaller distill.batch_size."
        )


def _refuse_together(sentence: str) -> None:
    """Raise the error on every rank, to be printed by rank 0 only. The ranks have no process group yet."""
    raise UsageError(sentence) if is_first() else SaidElsewhere()
