"""The logger that `logger=` names."""

from __future__ import annotations

from dataclasses import asdict

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from ppcl.artifacts.headers import fingerprint
from ppcl.context import Run


def make_logger(run: Run, stage: str) -> Logger | bool:
    """The logger that `logger=` names; W&B gets the resolved configuration, and a run per folder and stage."""
    settings = run.config.logger
    if settings.kind == "none":
        return False
    if settings.kind == "csv":
        return CSVLogger(run.folder, name=f"logs/{stage}")
    logger = WandbLogger(
        project=settings.project,
        name=f"{run.config.name}/{stage}",
        save_dir=str(run.folder),
        mode=settings.mode,
        id=fingerprint({"folder": str(run.folder.resolve()), "stage": stage}),
        resume="allow",
    )
    logger._wandb_init.pop("anonymous", None)  # which wandb warns of, and Lightning passes whatever it is
    logger.experiment.config.update(asdict(run.config), allow_val_change=True)
    return logger


def finish_logger(logger: Logger | bool) -> None:
    """Close a logger for good: W&B would give the next job of a sweep the same run."""
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()
