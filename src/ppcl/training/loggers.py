"""Creates and closes the Lightning logger that `logger=` selects."""

from __future__ import annotations

import secrets
from dataclasses import asdict

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from ppcl.artifacts.files import read_json, write_json
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

    With W&B, every pair of a run folder and a stage is one W&B run, which a resumed training continues. The jobs of a
    sweep are a group. The resolved configuration is logged with it.

    Raises `UsageError` if W&B refuses or cannot be reached.
    """
    settings = run.config.logger
    if settings.kind == "none":
        return False
    if settings.kind == "csv":
        return CSVLogger(run.folder, name=f"logs/{stage}")
    sweep = run.folder.parent.name if (run.folder.parent / "multirun.yaml").exists() else None
    logger = WandbLogger(
        project=settings.project,
        name="/".join([run.config.name, *([run.folder.name] if sweep else []), stage]),
        save_dir=str(run.folder),
        mode=settings.mode,
        id=_wandb_id(run, stage),
        group=sweep,
        resume="allow",
    )
    logger._wandb_init.pop("anonymous", None)  # Lightning always passes this argument, and wandb warns about it
    import wandb

    try:
        logger.experiment.config.update(asdict(run.config), allow_val_change=True)
    except wandb.errors.Error as error:
        raise UsageError(f"logger=wandb logger.mode={settings.mode}: {_first_line(error)}; {_OTHERWISE}.") from None
    return logger


def _wandb_id(run: Run, stage: str) -> str:
    """Return the id of the W&B run of a stage. It is random, and kept in `wandb.json` in the run's folder.

    An id that was made from the folder's name would mix runs of one name from several machines.
    """
    path = run.folder / "wandb.json"
    known = read_json(path, "The record of W&B's ids") if path.exists() else {}
    if stage not in known:
        known[stage] = secrets.token_hex(4)
        write_json(path, known)
    return str(known[stage])


def finish_logger(logger: Logger | bool) -> None:
    """Finish the W&B run, if there is one, so that the next job of a sweep in this process starts a new one."""
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()
