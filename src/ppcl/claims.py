"""Claims a run for a command, so that no other command runs the same stage in it, and clears what killed ones left."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

from ppcl.artifacts.files import sweep
from ppcl.artifacts.locks import locked
from ppcl.context import Run


def claim(run: Run, side_by_side: Collection[str], locks: ExitStack) -> None:
    """Lock the stages of the command in the run's folder until `locks` is closed.

    `side_by_side`: the stages that several commands may run in one folder. Trainings of single intervals may, too.

    Temporary files that killed commands have left in the run and in the cache are deleted. Raises `UsageError` if
    another command runs one of the stages here.
    """
    free = {*side_by_side} | ({"depth"} if run.config.distill.intervals is not None else set())
    for stage in sorted({*run.config.stages} - free):
        what = f"'stages=[{stage}]' is being run in {run.folder}"
        locks.enter_context(locked(run.folder / f".{stage}.lock", what, "wait for its end, or give another name="))
    for folder in {run.folder, run.base, *Path(run.config.paths.cache_dir).glob("*")}:
        sweep(folder, deep=True)
