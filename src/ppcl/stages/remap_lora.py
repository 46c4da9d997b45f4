"""Convert a LoRA of the full model for the pruned model. Layers that the pruned model does not have are dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ppcl
from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.headers import Header, is_current
from ppcl.artifacts.tensors import read_tensors, write_tensors
from ppcl.components import loading_into
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.model_fit import without_weights
from ppcl.surgery.lora_files import METADATA_KEY
from ppcl.surgery.lora_marks import mark_of, marked_metadata
from ppcl.surgery.provenance import exported_blocks
from ppcl.surgery.remap import remap_lora


def _pruned_transformer(run: Run) -> Any:
    """Return the exported transformer on the meta device, since only names and shapes are needed.

    Raises `UsageError` if there is no export, or if it is of another family.
    """
    folder = Path(run.config.lora.model or run.folder / "export") / run.teacher.component
    if not (folder / "config.json").exists():
        raise UsageError(f"lora.model: {folder.parent} holds no exported model; run 'stages=[export]' first.")
    config = read_json(folder / "config.json", "The exported config")
    facts, kind = run.family.facts, config.get("_class_name")
    if kind not in (facts.transformer, *facts.pruned_models):
        known = ", ".join((facts.transformer, *facts.pruned_models))
        raise UsageError(f"{folder} holds a {kind}; model={run.config.model.name} is a {known}.")
    stock = kind == facts.transformer
    return without_weights(run.family.transformer_class if stock else getattr(ppcl, str(kind)), folder)


def run(run: Run) -> None:
    """Write `lora/NAME.safetensors` for `pipeline.load_lora_weights` of the exported pipeline.

    The names of dropped layers are stored in `lora/NAME.json`. Raises `UsageError` if there is no exported model, if
    the file is no LoRA of the full model, or if an earlier result has other settings. Nothing is written then.
    """
    config = run.config.lora
    path = Path(str(config.path))
    target = run.folder / "lora" / f"{path.stem}.safetensors"
    transformer = _pruned_transformer(run)
    made_from = {
        "lora": str(path.resolve()),
        "size": path.stat().st_size,
        "modified": path.stat().st_mtime_ns,
        "source": config.source,
        "model": transformer.config.get("ppcl", {}).get("fingerprint"),
    }
    if config.counts is not None:
        made_from["counts"] = config.counts
    header = Header("ppcl.lora", made_from)
    if is_current(target.with_suffix(".json"), header, "delete that file to make it anew", [target]):
        read_tensors(target, "remap_lora")
        run.say("remap_lora", f"reused {target}")
        return
    try:
        found = remap_lora(
            path,
            transformer,
            source=config.source,
            counts=config.counts,
            pipeline_class=run.teacher.pipeline_class,
        )
    except UsageError as error:
        raise UsageError(f"lora.path={path}: {error}") from None
    mark = mark_of(exported_blocks(transformer).kept)
    metadata = {METADATA_KEY: json.dumps(marked_metadata(found.state, mark)), "format": "pt"}
    write_tensors(target, found.state, metadata)
    left_out = {"left_out": found.left_out} if found.left_out else {}
    write_json(target.with_suffix(".json"), header.to_json() | {"dropped": found.dropped} | left_out)
    run.say(
        "remap_lora",
        f"{len(found.layers)} modules mapped, {len(found.dropped)} dropped: the pruned model has no place for them",
    )
    for told, names in (("dropped", found.dropped), ("diffusers leaves out", found.left_out)):
        if names:
            few = ", ".join(names[:3])
            run.say("remap_lora", f"{told}: {few}{', ...' if len(names) > 3 else ''}; all in {target.stem}.json")
    where = "".join(f" with {name}=True" for name in loading_into(run.teacher.component))
    run.say("remap_lora", f"wrote {target}; pipeline.load_lora_weights takes it{where}")
