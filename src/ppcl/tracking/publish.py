"""Publishes to W&B what the stages of a command have made, and closes the W&B run as finished or as failed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import Any

from ppcl.artifacts.headers import fingerprint
from ppcl.context import Run
from ppcl.errors import Stopped
from ppcl.report.compare import results_of
from ppcl.sentences import told
from ppcl.tracking.lineage import Made, made_by
from ppcl.tracking.loggers import read_record, wandb_logger, write_record
from ppcl.tracking.shown import SHOWS, Shown

_CHARACTERS_OF_URLS = "?#"  # W&B reads the path of a referenced file as a URL


@contextmanager
def tracked(run: Run, *, in_sweep: bool) -> Iterator[Callable[[str], None]]:
    """Give the block a function that it calls with the name of every stage that has ended, to publish its results.

    The W&B run is closed with the block: as failed after an error, whose sentence goes to its summary as `failed`. A
    command that fails before its first stage has no W&B run, unless it is a job of a sweep, which would be missed in
    the sweep's table. Does nothing unless `logger=wandb`.
    """
    if run.config.logger.kind != "wandb" or not run.writes:
        yield lambda stage: None
        return
    try:
        yield lambda stage: _publish(run, stage)
    except BaseException as error:
        if run.wandb is not None or (in_sweep and isinstance(error, Exception)):
            with suppress(Exception):  # what has ended the command is what must be told
                _close(run, error)
        raise
    _close(run, None)


def _close(run: Run, error: BaseException | None) -> None:
    if run.wandb is None and error is None:
        return
    experiment: Any = wandb_logger(run).experiment
    experiment.summary.update({f"result/{key}": value for key, value in results_of(run.folder).items()})
    if isinstance(error, Stopped):
        experiment.mark_preempting()  # the same command resumes it
    experiment.summary["failed"] = "" if error is None else told(error)
    experiment.finish(exit_code=0 if error is None else 1)
    run.wandb = None


def _publish(run: Run, stage: str) -> None:
    """Log what a stage shows, and its artifacts, unless the W&B run has them already."""
    shown, record = SHOWS[stage](run), read_record(run.folder)
    digest = _digest(shown)
    made = [each for each in made_by(run, stage) if record["artifacts"].get(each.name) != each.digest]
    if record["stages"].get(stage) == digest and not made:
        return
    experiment: Any = wandb_logger(run).experiment
    with _kept_beside(run):
        if record["stages"].get(stage) != digest:
            _show(experiment, stage, shown)
        for artifact in made:
            _log(experiment, run, artifact, record["artifacts"])
    record["stages"][stage] = digest
    write_record(run.folder, record)


@contextmanager
def _kept_beside(run: Run) -> Iterator[None]:
    """Let W&B keep the files of artifacts in the run's folder within the context, until they are uploaded.

    It would keep those of offline runs in the user's home, apart from the folder that `wandb sync` is given.
    """
    if "WANDB_DATA_DIR" in os.environ:  # the user has said where
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(run.folder.absolute() / "wandb")
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


def _digest(shown: Shown) -> str:
    """Return a hash of everything that a stage shows, of files their content."""
    files = {name: path for name, path in {**shown.pictures, **shown.pages}.items() if path.is_file()}
    return fingerprint(
        {
            "numbers": shown.numbers,
            "tables": {name: [table.columns, table.rows] for name, table in shown.tables.items()},
            "files": {name: sha256(path.read_bytes()).hexdigest() for name, path in files.items()},
        }
    )


def _show(experiment: Any, stage: str, shown: Shown) -> None:
    import wandb

    found: dict[str, Any] = dict(shown.numbers)
    found |= {name: wandb.Table(list(table.columns), table.rows) for name, table in shown.tables.items()}
    found |= {name: wandb.Image(str(path)) for name, path in shown.pictures.items() if path.is_file()}
    found |= {name: wandb.Html(path.read_text(encoding="utf-8"), inject=False) for name, path in shown.pages.items()}
    if found:
        experiment.log({f"{stage}/{name}": value for name, value in found.items()})


def _log(experiment: Any, run: Run, artifact: Made, published: dict[str, str]) -> None:
    """Log an artifact, and before it those inputs of the same run that W&B does not have yet.

    Its records are uploaded. Weights are too large for that, so that W&B is only told where they lie, unless
    `logger.upload=true`. The digest is an alias, by which other runs find this version.
    """
    import wandb

    if published.get(artifact.name) == artifact.digest:
        return
    for each in artifact.inputs:
        if each.owner == artifact.owner:
            _log(experiment, run, each, published)
    entry = wandb.Artifact(artifact.name, artifact.kind, metadata=artifact.metadata)
    for path in artifact.records:
        entry.add_file(str(path), name=path.name)
    for path in artifact.weights:
        name = path.relative_to(artifact.records[0].parent).as_posix()
        if run.config.logger.upload:
            entry.add_file(str(path), name=name, policy="immutable")  # no copy before it is sent
        elif not {*_CHARACTERS_OF_URLS} & {*str(path)}:
            entry.add_reference(f"file://{path.absolute()}", name=name, checksum=False)
    if run.config.logger.mode != "offline":  # W&B refuses this there
        for each in artifact.inputs:
            with suppress(wandb.errors.Error, ValueError):  # another project may have it, or nobody
                experiment.use_artifact(f"{each.name}:{each.digest}")
    experiment.log_artifact(entry, aliases=["latest", artifact.digest])
    published[artifact.name] = artifact.digest
