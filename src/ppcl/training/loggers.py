"""Creates and closes the Lightning logger that `logger=` selects."""

from __future__ import annotations

from dataclasses import asdict

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from ppcl.artifacts.headers import fingerprint
from ppcl.context import Run


def make_logger(run: Run, stage: str) -> Logger | bool:
    """Return the logger that `logger=` selects, or False for `logger=none`.

    With W&B, every pair of a run folder and a stage is one W&B run, which a resumed training continues. The resolved
    configuration is logged with it.
    """
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
    logger._wandb_init.pop("anonymous", None)  # Lightning always passes this argument, and wandb warns about it
    logger.experiment.config.update(asdict(run.config), allow_val_change=True)
    return logger


def finish_logger(logger: Logger | bool) -> None:
    """Finish the W&B run, if there is one, so that the next job of a sweep in this process starts a new one."""
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()
