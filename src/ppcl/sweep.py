"""Runs the jobs of a sweep so that a failed one ends no other, and compares all of them in a table at the end."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from ppcl.artifacts.jobs import MULTIRUN, NOT_ENDED, Job, read_job, write_job
from ppcl.command import as_overrides
from ppcl.errors import UsageError
from ppcl.launch import is_first
from ppcl.progress import visible
from ppcl.sentences import is_unexpected, told

failures: list[str] = []  # the sentences of the failed jobs of the last sweep

_FOLDERS = ("name", "run", "paths.runs_dir")  # keys that give each job a folder of its own already
_COUNT = "PPCL_JOBS"  # environment variable that tells a job how many jobs the sweep has


# Before the jobs


def check_sweep(arguments: Sequence[str]) -> None:
    """Raise `UsageError` if the jobs of this command line would write over each other's results, or are none.

    A mistake in the syntax is left to Hydra.
    """
    try:
        overrides = OverridesParser.create().parse_overrides([a for a in arguments if not a.startswith("-")])
    except HydraException:
        return
    chosen = {override.key_or_group: override for override in overrides}
    is_sweep = "sweep" in chosen and chosen["sweep"].value() is not None
    if not any(_is_multirun(argument) for argument in arguments):
        if is_sweep and not any(argument.startswith("-") for argument in arguments):  # flags only show something
            raise UsageError(
                f"{chosen['sweep'].input_line} is a whole sweep: add --multirun, as the first argument of ppcl."
            )
        return
    run = chosen.get("run")
    others = ["sweep"] if is_sweep else []
    others += [key for key, override in chosen.items() if key not in _FOLDERS and override.is_sweep_override()]
    if run is not None and run.value() is not None and others:
        raise UsageError(
            f"{run.input_line} has jobs work in one folder, where those of {chosen[others[0]].input_line} would write "
            "over each other's results: use paths.base_run=FOLDER name=NEW, which gives each job a folder of its own."
        )


def _is_multirun(argument: str) -> bool:
    return argument in ("-m", "hydra.mode=MULTIRUN") or (len(argument) > 2 and "--multirun".startswith(argument))


def divide(config: DictConfig) -> tuple[list[Override], list[Override]]:
    """Return the overrides that all jobs of a sweep share, and those that differ.

    `config`: the sweep's own, with `hydra.sweeper.params`. What is typed replaces these.
    """
    given = [f"{key}={values}" for key, values in (config.hydra.sweeper.get("params") or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*given, *config.hydra.overrides.task])
    last = {override.get_key_element(): override for override in overrides}.values()
    return [one for one in last if not one.is_sweep_override()], [one for one in last if one.is_sweep_override()]


def _count(swept: Sequence[Override]) -> int | None:
    """Return the number of all combinations; None if there is an interval, which has no number of values."""
    if not all(override.is_discrete_sweep() for override in swept):
        return None
    return math.prod(len(list(override.sweep_string_iterator())) for override in swept)


# A job


def announce(job: Any) -> None:
    """Print which job of the sweep begins, as a heading of what it prints. `job`: Hydra's configuration of it."""
    if is_first():
        count = job.job.env_set.get(_COUNT)
        if count and int(count) <= job.job.num:  # a search also goes on with trials that were killed
            count = None
        told = job.job.override_dirname or job.runtime.output_dir
        print(f"     sweep  job {job.job.num + 1}{f' of {count}' if count else ''}: {visible(told)}", flush=True)


def run_job(job: Any, run: Callable[[], None]) -> None:
    """Call `run` for one job of a sweep, and record in its folder how that ended. Only a signal ends the sweep.

    `job`: Hydra's configuration of the job. An unexpected error is also printed with its traceback.
    """
    folder, failed = Path(job.runtime.output_dir), None
    if is_first():
        write_job(folder, Job(list(job.overrides.task), NOT_ENDED, job.job.num))
    try:
        run()
    except Exception as error:
        failed = told(error)
        if is_unexpected(error):
            traceback.print_exc()
    if is_first():
        write_job(folder, Job(list(job.overrides.task), failed, job.job.num))
        if failed is not None:
            print(f"     sweep  job {job.job.num + 1} has failed: {visible(failed)}", flush=True)
    elif failed is not None:
        failures.append(failed)


# Around all jobs


class Sweep(Callback):
    """Hydra calls this around a sweep, in the process that started it, whichever launcher runs the jobs."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Have the folder of each job named by what sets it apart, and tell the jobs how many there are.

        The name has no number, so that the same sweep again, or one with more values, finds what is finished.
        """
        fixed, swept = divide(config)
        naming = config.hydra.job.config.override_dirname
        left_out = [*naming.exclude_keys, *(override.key_or_group for override in fixed), *_FOLDERS]
        added = as_overrides({"hydra.job.config.override_dirname.exclude_keys": [*dict.fromkeys(left_out)]})
        count = config.hydra.sweeper.get("trials") or _count(swept)
        if count is not None:
            added.append(f"+hydra.job.env_set.{_COUNT}='{count}'")
        config.hydra.overrides.hydra.extend(added)  # launchers compose each job's configuration with these

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Tell which jobs have failed, and write the table of all of them."""
        if not is_first():
            return
        from ppcl.report.compare import compared, jobs_of, write_comparison

        folder = Path(config.hydra.sweep.dir)
        if {*folder.iterdir()} == {folder / MULTIRUN}:  # the jobs were elsewhere, or have only been estimated
            (folder / MULTIRUN).unlink()
            folder.rmdir()
            return
        jobs = jobs_of(folder)
        for job in jobs:
            failed = read_job(job).failed
            if failed is not None:
                failures.append(failed)
                print(f"ppcl: job {job.name}: {visible(failed)}", file=sys.stderr)
        if len(jobs) > 1:
            count = f"{len(jobs)} jobs, {len(failures)} failed" if failures else f"{len(jobs)} jobs"
            print(f"     sweep  {count}, compared in {write_comparison(compared(jobs), folder)}")
