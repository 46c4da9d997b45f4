"""Runs the jobs of a sweep so that a failed one ends no other, and compares all of them in a table at the end."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ppcl.artifacts.jobs import read_job, write_job
from ppcl.errors import UsageError
from ppcl.launch import is_first
from ppcl.progress import visible
from ppcl.sentences import failed_access, sentence

failures: list[str] = []  # the sentences of the failed jobs of the last sweep


def run_job(job: Any, run: Callable[[], None]) -> None:
    """Call `run` for one job of a sweep, and record in its folder how that ended. Only a signal ends the sweep.

    `job`: Hydra's configuration of the job. An unexpected error is also printed with its traceback.
    """
    folder, failed = Path(job.runtime.output_dir), None
    try:
        run()
    except (UsageError, OmegaConfBaseException) as error:
        failed = sentence(error)
    except Exception as error:
        access = failed_access(error)
        failed = sentence(access) if access is not None else f"{type(error).__name__}: {error}"
        if access is None:
            traceback.print_exc()
    if is_first():
        write_job(folder, job.overrides.task, failed)
    elif failed is not None:
        failures.append(failed)


class Comparison(Callback):
    """Hydra calls this at the end of a sweep, in the process that started it, whichever launcher ran the jobs."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Tell which jobs have failed, and write the table of all of them."""
        if not is_first():
            return
        from ppcl.report.compare import compared, jobs_of, write_comparison

        folder = Path(config.hydra.sweep.dir)
        jobs = jobs_of(folder)
        for job in jobs:
            failed = read_job(job).failed
            if failed is not None:
                failures.append(failed)
                print(f"ppcl: job {job.name}: {visible(failed)}", file=sys.stderr)
        if len(jobs) > 1:
            count = f"{len(jobs)} jobs, {len(failures)} failed" if failures else f"{len(jobs)} jobs"
            print(f"     sweep  {count}, compared in {write_comparison(compared(jobs), folder)}")
