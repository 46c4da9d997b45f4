"""Traces the teacher of a run, on the first call of its pipeline that was recorded."""

from __future__ import annotations

from pathlib import Path

from lightning.fabric.utilities import move_data_to_device

from ppcl.context import Run
from ppcl.data.recording.files import read_call, record_of
from ppcl.errors import UsageError
from ppcl.families.registry import register
from ppcl.families.traced.family import Traced, facts_of
from ppcl.families.traced.known import TRACE, trace_path, write_trace
from ppcl.families.traced.trace import Trace, trace


def ensure_traced(run: Run, record: Path | None = None) -> None:
    """Trace the teacher if its family is `traced`, unless that was done, and keep the trace in the cache.

    The run's folder gets a copy, `trace.json`. `record`: that of a recorded prompt; None for the first of a recording
    that is whole. Raises `UsageError` if there is none, or if the model cannot be traced.
    """
    family = run.family
    if not isinstance(family, Traced):
        return
    if family.trace is not None:
        _keep(run, family.trace)
        return
    if run.config.data.name != "prompts":
        raise UsageError(
            f"model.path={run.config.model.path} is traced on calls of its own pipeline, and none are recorded: give "
            "data.path=prompts.txt, and add cache to stages."
        )
    record = record or record_of(run.data.whole_cache(), 0)
    inputs = move_data_to_device(dict(read_call(record, 0).arguments), run.device)
    found = trace(run.teacher.pipeline.transformer, inputs)
    write_trace(trace_path(run.config.paths.cache_dir, family.facts.transformer, family.arch), found)
    for line in str(found).splitlines():
        run.say("trace", line.removeprefix("  "))
    family.adopt(found)
    family.facts = facts_of(found)
    register(family.facts)
    _keep(run, found)


def _keep(run: Run, trace: Trace) -> None:
    """Write the trace into the run's folder, where `ppcl.plug` finds it."""
    if run.writes and not (run.folder / TRACE).exists():
        write_trace(run.folder / TRACE, trace)
