"""Creates the Lightning logger that `logger=` selects."""

from __future__ import annotations

import re
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.jobs import is_job
from ppcl.config import Config
from ppcl.context import Run
from ppcl.errors import UsageError

_OTHERWISE = "use logger.mode=offline, which needs no account, or logger=csv"


def check_logger(config: Config) -> None:
    """Raise `UsageError` if a command logs to W&B online and this machine has no key for it. Uses no network."""
    if config.logger.kind != "wandb" or config.logger.mode != "online":
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
    """Return the logger of a stage: False for `logger=none`, and with W&B that of the whole command.

    Raises `UsageError` if W&B refuses or cannot be reached.
    """
    kind = run.config.logger.kind
    if kind == "none":
        return False
    return CSVLogger(run.folder, name=f"logs/{stage}") if kind == "csv" else wandb_logger(run)


def wandb_logger(run: Run) -> WandbLogger:
    """Return the logger of the run's W&B run, which is opened on first use, with the resolved configuration.

    Every command that works in a run's folder goes on with the same W&B run. The jobs of a sweep are a group. Raises
    `UsageError` if W&B refuses or cannot be reached.
    """
    if run.wandb is not None:
        assert isinstance(run.wandb, WandbLogger)
        return run.wandb
    settings, folder = run.config.logger, run.folder
    in_sweep = is_job(folder)
    import wandb

    try:
        logger = WandbLogger(
            project=settings.project,
            name=f"{folder.parent.name}/{folder.name}" if in_sweep else folder.name,
            save_dir=str(folder),
            mode=settings.mode,
            id=read_record(folder)["id"],
            group=folder.parent.name if in_sweep else None,
            resume="allow",
            settings=wandb.Settings(quiet=True),  # it would end with a page of numbers
        )
        logger._wandb_init.pop("anonymous", None)  # Lightning always passes this argument, and wandb warns about it
        logger.experiment.config.update(asdict(run.config), allow_val_change=True)
    except wandb.errors.Error as error:
        raise UsageError(f"logger=wandb logger.mode={settings.mode}: {_first_line(error)}; {_OTHERWISE}.") from None
    except ValueError as error:  # of a variable such as WANDB_MODE
        reason = " ".join(str(error).split()[:20]).rstrip(".")
        raise UsageError(f"logger=wandb: W&B refuses its settings: {reason}; look at the variables WANDB_*.") from None
    run.wandb = logger
    where = logger.experiment.dir if settings.mode == "offline" else logger.experiment.url
    if settings.mode != "disabled":
        run.say("wandb", f"logs to {Path(where).parent if settings.mode == 'offline' else where}")
    return logger


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record `wandb.json` of a run's folder: the `id` of its W&B run, and digests of what is there.

    They are the digests of what `stages` show, and of `artifacts`, by name. A folder without a record gets one, with a
    random id: an id that was made from the folder's name would mix runs of one name from several machines. Raises
    `UsageError` if the record is damaged.
    """
    path = folder / "wandb.json"
    record: dict[str, Any] = {"id": secrets.token_hex(4), "stages": {}, "artifacts": {}}
    try:
        known = read_json(path, "The record of W&B's id") if path.exists() else {}
        whole = re.fullmatch(r"[\w-]{1,64}", known.get("id", record["id"]), re.ASCII)
        if not whole or not all(isinstance(known.get(key, {}), dict) for key in ("stages", "artifacts")):
            raise TypeError(known)
    except (UsageError, TypeError):
        raise UsageError(f"{path} is damaged: delete it, and this run gets a new id at W&B.") from None
    record |= known
    if "id" not in known:  # so it is in records of earlier versions, too
        write_record(folder, record)
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record that `read_record` reads."""
    write_json(folder / "wandb.json", record)
