"""Creates and closes the Lightning logger that `logger=` selects."""

from __future__ import annotations

from dataclasses import asdict

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from ppcl.artifacts.headers import fingerprint
from ppcl.config import Config
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.stages import TRAINED

_OTHERWISE = "use logger.mode=offline, which needs no account, or logger=csv"


def check_logger(config: Config) -> None:
    """Raise `UsageError` if a stage logs to W&B online and this machine has no key for it. Uses no network."""
    logs = {*TRAINED, "pretrain", "evaluate"} & {*config.stages}
    if config.logger.kind != "wandb" or config.logger.mode != "online" or not logs:
        return
    import wandb

    try:
        known = wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        raise UsageError(f"logger=wandb logger.mode=online: {_first_line(error)}; {_OTHERWISE}.") from None
    if not known:
        raise UsageError(
            f"logger=wandb logger.mode=online needs a key of W&B: set WANDB_API_KEY, or run `wandb login`, or "
            f"{_OTHERWISE}."
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")


def make_logger(run: Run, stage: str) -> Logger | bool:
    """Return the logger that `logger=` selects, or False for `logger=none`.

    With W&B, every pair of a run folder and a stage is one W&B run, which a resumed training continues. The resolved
    configuration is logged with it. Raises `UsageError` if W&B refuses or cannot be reached.
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
    import wandb

    try:
        logger.experiment.config.update(asdict(run.config), allow_val_change=True)
    except wandb.errors.Error as error:
        raise UsageError(f"logger=wandb logger.mode={settings.mode}: {_first_line(error)}; {_OTHERWISE}.") from None
    return logger


def finish_logger(logger: Logger | bool) -> None:
    """Finish the W&B run, if there is one, so that the next job of a sweep in this process starts a new one."""
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()
