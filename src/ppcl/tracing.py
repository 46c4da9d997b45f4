"""Traces the teacher of a run, on the first call of its pipeline that was recorded."""

from __future__ import annotations

from pathlib import Path

from lightning.fabric.utilities import move_data_to_device

from ppcl.config import Config
from ppcl.context import Run
from ppcl.data.recording.files import read_call, record_of
from ppcl.errors import UsageError
from ppcl.families.registry import register
from ppcl.families.traced.family import Traced, facts_of
from ppcl.families.traced.known import TRACE, trace_path, write_trace
from ppcl.families.traced.trace import Trace, trace
from ppcl.stages import STAGES
from ppcl.validation.pruning import budget_of


def needs_trace(config: Config, stage: str) -> bool:
    """Return whether a stage runs blocks of the teacher, or builds blocks that are pruned in width."""
    if stage in ("pretrain", "cache", "report"):  # `cache` traces the teacher itself, with its first prompt
        return False
    return STAGES[stage].data or config.width.source != "none" or budget_of(config) is not None


def ensure_traced(run: Run, record: Path | None = None) -> None:
    """Trace the teacher if its family is `traced`, unless that was done, and keep the trace in the cache.

    The run's folder gets a copy, `trace.json`. A teacher that is pruned in width is only drawn, and needs no trace.

    `record`: that of a recorded prompt; None for the first of a recording that is whole. Raises `UsageError` if there
    is none, or if the model cannot be traced.
    """
    family = run.family
    if not isinstance(family, Traced) or "pruned_feed_forwards" in family.arch:
        return
    if family.trace is not None:
        _keep(run, family.trace)
        return
    check_traceable(run)
    record = record or record_of(run.data.whole_cache(), 0)
    inputs = move_data_to_device(dict(read_call(record, 0).arguments), run.device)
    found = trace(run.teacher.transformer, inputs)
    cache, component = run.config.paths.cache_dir, run.teacher.component
    write_trace(trace_path(cache, component, family.facts.transformer, family.arch), found)
    for line in str(found).splitlines():
        run.say("trace", line.removeprefix("  "))
    family.adopt(found)
    family.facts = facts_of(found, takes_lora=family.facts.takes_lora)
    register(family.facts)
    _keep(run, found)


def check_traceable(run: Run) -> None:
    """Raise `UsageError` if the teacher is not traced yet, a stage needs that, and it cannot be done.

    It cannot where the data are no prompts, or where the teacher is streamed: the whole model is called for it.
    """
    config, family = run.config, run.family
    if not isinstance(family, Traced) or family.trace is not None:
        return
    tracing = [stage for stage in STAGES if stage in config.stages and (stage == "cache" or needs_trace(config, stage))]
    if config.model.streaming and tracing and "pruned_feed_forwards" not in family.arch:
        raise UsageError(
            f"model.streaming=true: model.path={config.model.path} was not traced yet, which takes the whole teacher: "
            f"run 'stages=[{tracing[0]}]' in a command of its own, with model.streaming=false (and "
            "trainer.accelerator=cpu if the card is too small)."
        )
    if config.data.name == "prompts" or config.model.path is None:
        return
    if any(needs_trace(config, stage) for stage in config.stages) and "pruned_feed_forwards" not in family.arch:
        raise UsageError(
            f"model.path={config.model.path} holds a {run.teacher.files.index['_class_name']}, which is traced on its "
            "own calls, and none are recorded: give data.path=prompts.txt, and add cache to stages."
        )


def _keep(run: Run, trace: Trace) -> None:
    """Write the trace into the run's folder, where `ppcl.plug` finds it."""
    if run.writes and not (run.folder / TRACE).exists():
        write_trace(run.folder / TRACE, trace)
