"""Facts on how a run was made: its data, cost of trainings, commands that repeat or continue it, and files."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ppcl.command import OF_COMMAND, as_overrides
from ppcl.config import Config
from ppcl.context import Run
from ppcl.options import declared
from ppcl.progress import duration
from ppcl.stages import STAGES
from ppcl.validation.pruning import resolve_intervals

# What each stage writes to a run's folder. Stages that write to the cache are left out.
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
    "export": "the pruned pipeline, for diffusers",
    "quantized": "the pruned pipeline with 8-bit or 4-bit weights",
    "finetuned": "the fine-tuned model",
    "plugs": "every trained student and projector",
    "plan": "intervals, measured costs, and the plugs that the plan has chosen",
    "images": "all pictures",
    "layouts": "pictures as the scorers of GenEval and DPG-Bench read them",
    "scores": "scores of each variant",
    "training": "cost, held-out losses and sample pictures of each training",
    "logs": "losses of each training",
    "config.yaml": "every setting",
}


def data_of(run: Run) -> dict[str, Any]:
    """Return a description of the training data: `name` and `words`; for pictures also `path` and numbers of samples.

    `samples` counts all of them, `held_out` those that are kept from training. Both are None if the cache or its source
    is gone.
    """
    data = run.config.data
    if data.name == "shapes":
        return {"name": "shapes", "words": "the shapes world: 32x32 toy pictures"}
    if data.name == "none":
        return {"name": "none", "words": "no data"}
    samples, held_out = run.data.counted()
    path = data.path or data.cache
    words = f"prompts of {path}" if data.name == "prompts" else f"captioned pictures of {path}"
    if samples is not None:
        words = f"{samples:,} {words}, {held_out:,} of them held out"
    return {"name": data.name, "path": path, "samples": samples, "held_out": held_out, "words": words}


def trainings_in_words(trainings: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Return a table row for each training: stage, steps, duration, time per step, peak memory of a step."""
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
    """Return a phrase that says which method found the intervals, or that they were given."""
    if resolve_intervals(run.config) is not None:
        return "intervals as given"
    if not run.has_intervals:
        return "no intervals yet"
    return f"intervals found by method {run.config.method.name}"


def _shown(path: Path) -> str:
    """Return a path as a user would type it: relative to the working directory if it is inside."""
    path, here = path.absolute(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _quoted(override: str) -> str:
    """Return an override quoted for the shell where that is needed, by double quotes if it has single ones itself."""
    return f'"{override}"' if "'" in override and not {*'"$`\\!'} & {*override} else shlex.quote(override)


def commands_of(run: Run) -> dict[str, str]:
    """Return commands to copy, by what they do.

    They use `run=FOLDER`, which takes the configuration from the run's folder.
    """
    stages = ["cache"] if run.config.data.path is not None else []
    for stage, left in _LEFT.items():
        if any(run.folder.glob(left)):
            stages += ["probe", stage] if stage == "detect" else [stage]
    stages += [stage for stage in begun(run) if stage not in stages]
    if run.config.distill.from_boundaries and "depth" in stages:
        stages.append("boundaries")
    again = f"'stages=[{','.join(sorted({*stages, 'report'}, key=list(STAGES).index))}]'"
    settings = "".join(f" {_quoted(item)}" for item in _settings(run))
    (folder,) = map(_quoted, as_overrides({"run": _shown(run.folder)}))
    given = " 'generate.images=[picture.png]'" if run.family.facts.max_references else ""
    launcher = "ppcl" if run.config.strategy.kind == "single" else "torchrun --nproc-per-node N -m ppcl"
    return {
        "Run it again; what is there is reused": f"{launcher} {folder}{settings} {again}",
        "Draw your own prompts, one a line in prompts.txt": f"ppcl {folder} 'stages=[generate]' "
        f"generate.prompt_file=prompts.txt{given}",
        "Show them here": f"ppcl {folder}{settings} 'stages=[report]'",
    }


def begun(run: Run) -> list[str]:
    """Return the stages whose training was stopped before its end, by the checkpoints that they have left."""
    left = {"depth": "plugs/checkpoint-[!w]*", "width": "plugs/checkpoint-width-*"}
    left |= {stage: f"{stage}-checkpoint" for stage in ("detect", "finetune")}
    return [stage for stage in STAGES if stage in left and any(run.folder.glob(f"{left[stage]}/*"))]


def _settings(run: Run) -> list[str]:
    """Return overrides for the keys that `run=FOLDER` does not take from the folder, where they are not the default.

    Stages and uploads are left out.
    """
    keys = [key for key in OF_COMMAND if key != "stages" and not key.startswith("export.")]
    usual = {item.name: item.value for item in declared(Config())}
    said = {item.name: item.value for item in declared(run.config) if item.value != usual[item.name]}
    return as_overrides({name: value for name, value in said.items() if {name, name.partition(".")[0]} & {*keys}})


def link(run: Run, path: Path) -> str:
    """Return the address of a file or folder relative to the report, for use in a URL."""
    return quote(Path(os.path.relpath(path, run.report_folder)).as_posix())


def links_of(run: Run) -> list[dict[str, str]]:
    """Return name, address and meaning of each folder and file of this run, or else of `paths.base_run`."""
    links = []
    for name, meaning in _FOLDERS.items():
        for folder in (run.folder, run.base):
            if (folder / name).exists():
                links.append({"name": name, "href": link(run, folder / name), "meaning": meaning})
                break
    return links
