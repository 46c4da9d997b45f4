"""The record of a sweep's job, `job.json` in its folder: what was typed for it, and how it ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from ppcl.artifacts.files import read_json, write_json
from ppcl.errors import UsageError

JOB = "job.json"
MULTIRUN = "multirun.yaml"  # in the folder of a sweep, written by Hydra
NOT_ENDED = "it has not ended: it runs now, or was killed, and then the command of the sweep goes on with it."
BEST = "best.json"  # in the folder of a search, the best of its jobs


@dataclass(frozen=True)
class Job:
    """A job of a sweep: its overrides, such as `method=ppcl`, and the sentence that it has failed with, or None.

    `number`: its place in the order in which the sweep ran its jobs, from 0. Records of earlier versions have none.
    """

    overrides: list[str]
    failed: str | None
    number: int | None = None


def is_job(folder: Path) -> bool:
    """Return whether a run's folder is that of a job of a sweep."""
    return (folder.absolute().parent / MULTIRUN).exists()


def write_job(folder: Path, job: Job) -> None:
    """Record how a job has ended."""
    write_json(folder / JOB, asdict(job))


def read_job(folder: Path) -> Job:
    """Return a job's record. If it is damaged, the job counts as failed, so that it does not hide all others."""
    path = folder / JOB
    try:
        content = read_json(path, "The record of a job")
        job = Job(content["overrides"], content.get("failed"), content.get("number"))
        told = isinstance(job.failed, str | None) and isinstance(job.number, int | None)
        if told and isinstance(job.overrides, list) and all(isinstance(each, str) for each in job.overrides):
            return job
    except (UsageError, KeyError):
        pass
    return Job([], f"{path} is damaged: delete it, and give the command of the sweep again.")
