"""How a run was made: its data, what its trainings cost, the command that repeats it, and where things lie."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ppcl.artifacts.files import read_json
from ppcl.command import OF_COMMAND, as_overrides
from ppcl.config import Config
from ppcl.context import Run
from ppcl.data.cached import held_out_share, unit_record
from ppcl.errors import UsageError
from ppcl.options import declared
from ppcl.progress import duration
from ppcl.stages import STAGES
from ppcl.validation.pruning import resolve_intervals

# What each stage leaves in a run's folder, but those whose results are shared by all runs.
_LEFT = {
    "pretrain": "teacher",
    "detect": "plan/curves.json",
    "depth": "plugs/*-*.json",
    "import_published": "imported",
    "width": "plan/width.json",
    "plan": "plan/choice.json",
    "finetune": "finetuned",
    "export": "export",
    "quantize": "quantized",
    "remap_lora": "lora",
    "generate": "images",
    "evaluate": "scores",
}
_FOLDERS = {
    "export": "the pruned pipeline, which diffusers loads",
    "quantized": "the same with few bits a weight",
    "finetuned": "the fine-tuned model",
    "plugs": "every trained student and projector",
    "plan": "intervals, costs and the choice",
    "images": "all pictures",
    "scores": "scores of each variant",
    "training": "the cost of each training",
    "logs": "losses of each training",
    "config.yaml": "every setting",
}


def data_of(run: Run) -> dict[str, Any]:
    """The data that a run learns from: its `name`, `path` and number of `samples` where these are known, in `words`."""
    data = run.config.data
    if data.name == "shapes":
        return {"name": "shapes", "words": "the shapes world: 32x32 toy pictures"}
    samples = _cached_samples(run)
    path = data.path or data.cache
    words = f"captioned pictures of {path}"
    if samples is not None:
        words = f"{samples:,} {words}, {100 * held_out_share(data, samples):.3g}% of them held out"
    return {"name": data.name, "path": path, "samples": samples, "words": words}


def _cached_samples(run: Run) -> int | None:
    """How many samples the cache of the data holds; None where the cache or its source is not there."""
    try:
        units = run.data.cache_header.made_from["units"]
        records = [read_json(run.data.cache_folder / unit_record(unit), "The cache") for unit in units]
    except UsageError:
        return None
    return sum(record["samples"] for record in records)


def trainings_of(run: Run) -> dict[str, dict[str, float]]:
    """The cost of every training by its stage, also of those in the run that this one is based on."""
    found = {}
    for folder in (run.base, run.folder):
        for path in (folder / "training").glob("*.json"):
            found[path.stem] = read_json(path, "The training's cost")
    order = list(STAGES)
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def trainings_in_words(trainings: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """A row per training: stage, steps, time, time of a step, peak memory of a step."""
    return [
        [
            stage,
            f"{cost['steps']:,.0f}",
            duration(cost["seconds"]),
            f"{cost['seconds_per_step']:.2f} s",
            f"{cost['peak_memory_mb']:,.0f} MB",
        ]
        for stage, cost in trainings.items()
    ]


def made_by(run: Run) -> str:
    """How intervals were found: by which method, or that they were given."""
    if resolve_intervals(run.config) is not None:
        return "intervals as given"
    return f"intervals found by method {run.config.method.name}"


def _shown(path: Path) -> str:
    """A path as one types it: relative to the working directory where it lies in it."""
    path, here = path.absolute(), Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def commands_of(run: Run) -> dict[str, str]:
    """Commands to paste, by what they do: those that go on from this run take all else from its folder."""
    stages = ["cache"] if run.config.data.name != "shapes" else []
    for stage, left in _LEFT.items():
        if any(run.folder.glob(left)):
            stages += ["probe", stage] if stage == "detect" else [stage]
    if run.config.distill.from_boundaries and "depth" in stages:
        stages.append("boundaries")
    again = f"'stages=[{','.join(sorted({*stages, 'report'}, key=list(STAGES).index))}]'"
    folder, settings = _shown(run.folder), "".join(f" {shlex.quote(item)}" for item in _settings(run))
    given = " 'generate.images=[picture.png]'" if run.family.facts.max_references else ""
    launcher = "ppcl" if run.config.strategy.kind == "single" else "torchrun --nproc-per-node N -m ppcl"
    return {
        "Run it again; what is there is reused": f"{launcher} run={folder}{settings} {again}",
        "Draw your own prompts, one a line in prompts.txt": f"ppcl run={folder} 'stages=[generate]' "
        f"generate.prompt_file=prompts.txt{given}",
        "Show them here": f"ppcl run={folder}{settings} 'stages=[report]'",
    }


def _settings(run: Run) -> list[str]:
    """Overrides for what `run=` does not take from the run's folder, where it is not the default."""
    usual = {name: value for name, value, *_ in declared(Config())}
    said = {name: value for name, value, *_ in declared(run.config) if value != usual[name]}
    return as_overrides({name: value for name, value in said.items() if name.partition(".")[0] in OF_COMMAND[1:]})


def link(run: Run, path: Path) -> str:
    """The relative address of a file or folder, as the page has it."""
    return quote(Path(os.path.relpath(path, run.report_folder)).as_posix())


def links_of(run: Run) -> list[dict[str, str]]:
    """Links from the page to what the run, or the one that it is based on, has left."""
    links = []
    for name, meaning in _FOLDERS.items():
        for folder in (run.folder, run.base):
            if (folder / name).exists():
                links.append({"name": name, "href": link(run, folder / name), "meaning": meaning})
                break
    return links
