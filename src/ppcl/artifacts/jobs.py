"""The record of a sweep's job, `job.json` in its folder: what was typed for it, and how it ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from ppcl.artifacts.files import read_json, write_json

JOB = "job.json"
BEST = "best.json"  # in the folder of a search, the best of its jobs


@dataclass(frozen=True)
class Job:
    """A job of a sweep: its overrides, such as `method=ppcl`, and the sentence that it has failed with, or None.

    `number`: its place in the order in which the sweep ran its jobs, from 0. Records of earlier versions have none.
    """

    overrides: list[str]
    failed: str | None
    number: int | None = None


def write_job(folder: Path, job: Job) -> None:
    """Record how a job has ended."""
    write_json(folder / JOB, asdict(job))


def read_job(folder: Path) -> Job:
    """Read a job's record; `UsageError` if it is damaged."""
    content = read_json(folder / JOB, "The record of a job")
    return Job(list(content.get("overrides", [])), content.get("failed"), content.get("number"))
