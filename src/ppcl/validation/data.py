"""Checks of the data that a model is pruned on: where they are, and whether the model takes them."""

from __future__ import annotations

from pathlib import Path

from ppcl.config import Config
from ppcl.errors import UsageError
from ppcl.families.registry import FAMILIES
from ppcl.stages import STAGES
from ppcl.validation.values import aspect_ratio


def _needs_data(config: Config, stage: str) -> bool:
    """Return whether a stage, with its present settings, reads pictures and captions."""
    if stage == "depth" and config.distill.from_boundaries and config.distill.boundaries is not None:
        return False
    if stage == "plan":
        budget = config.budget
        return config.model.path is not None and any(
            limit is not None for limit in (budget.params, budget.memory_gb, budget.latency_ratio)
        )
    if stage == "quantize":
        return config.quantize.rounding == "least_squares"
    return STAGES[stage].data


def check_data(config: Config) -> None:
    """Check that there is data if a stage needs it, and that its settings fit together; raises `UsageError`."""
    data = config.data
    if data.name == "none":
        needing = [stage for stage in config.stages if _needs_data(config, stage) or stage == "cache"]
        if needing and not config.explain:
            raise UsageError(
                f"'stages=[{needing[0]}]' needs pictures with captions: give data.path=FOLDER, with a metadata.csv, "
                "class folders or .tar shards, or data.path=prompts.txt (data=shapes, 32x32 toy pictures, would teach "
                f"model={config.model.name} nothing)."
            )
        return
    if data.name == "shapes":
        if "cache" in config.stages:
            raise UsageError(
                "'stages=[cache]' has nothing to encode with data=shapes: give data.path=FOLDER, with a metadata.csv, "
                "class folders or .tar shards."
            )
        return
    if "pretrain" in config.stages:
        raise UsageError(f"data={data.name} does not go with 'stages=[pretrain]', which draws the shapes world.")
    if (data.path is None) == (data.cache is None):
        what = "prompts to record" if data.name == "prompts" else "pictures to encode"
        if data.path is not None:
            raise UsageError(
                f"data.path={data.path} and data.cache={data.cache} are both given: leave one out; data.path "
                f"names {what}, data.cache the folder of an earlier 'stages=[cache]'."
            )
        raise UsageError(f"data={data.name} needs data.path, {what}, or data.cache, a folder of such.")
    if data.cache is not None:
        if "cache" in config.stages:
            raise UsageError(
                f"data.cache={data.cache} exists, so there is nothing to cache: give data.path, or leave out cache."
            )
        record = "recording.json" if data.name == "prompts" else "cache.json"
        if not (Path(data.cache) / record).exists():
            raise UsageError(f"data.cache={data.cache} holds no {record}; name a folder that 'stages=[cache]' made.")
    if data.name == "prompts":
        return
    if config.model.family == "traced" and "cache" in config.stages:
        raise UsageError(
            f"data.path={data.path} is taken for pictures, but model.path={config.model.path} is traced, which takes "
            "prompts: give data.path=prompts.txt with a prompt a line, or a .jsonl (data=prompts "
            "takes a file of any other name as text)."
        )
    edits = FAMILIES[config.model.family].max_references > 0
    if edits and data.cache is None and not data.given:
        raise UsageError(
            f"data.given={data.given} names no given pictures, which model.family={config.model.family} needs: write "
            "data.given=[edit_image] for KEY.edit_image.jpg in a shard, or for that column of a table."
        )
    if data.given and (data.cache is not None or not edits):
        why = "data.cache has them" if edits else f"model.family={config.model.family} is given no pictures"
        raise UsageError(f"data.given={data.given}: {why}; leave it out.")
    if not data.captions:
        raise UsageError("data.captions=[] names no key for captions; give some, such as [caption].")
    if not data.aspects:
        raise UsageError("data.aspects=[] leaves no shape to cut pictures to; write some, such as 1:1.")
    for aspect in data.aspects:
        aspect_ratio(aspect)
