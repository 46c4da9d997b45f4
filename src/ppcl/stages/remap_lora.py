"""Convert a LoRA of the full model for the pruned model. Modules that the pruned model does not have are dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.headers import Header, is_current
from ppcl.artifacts.tensors import read_tensors, write_tensors
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.pictures.drawing import METADATA_KEY, read_lora
from ppcl.surgery.remap import adapter_metadata, remap_lora


def _pruned_transformer(run: Run) -> Any:
    """Return the exported transformer on the meta device, since only names and shapes are needed.

    Raises `UsageError` if there is no export, or if it is of another family.
    """
    folder = Path(run.config.lora.model or run.folder / "export") / "transformer"
    if not (folder / "config.json").exists():
        raise UsageError(f"lora.model: {folder.parent} holds no exported model; run 'stages=[export]' first.")
    config = read_json(folder / "config.json", "The exported config")
    family = run.family
    kinds = [family.transformer_class] + ([family.width.transformer_class] if family.width else [])
    classes = {kind.__name__: kind for kind in kinds}
    kind = config.get("_class_name")
    if kind not in classes:
        raise UsageError(f"{folder} holds a {kind}; model={run.config.model.name} is a {', '.join(classes)}.")
    with torch.device("meta"):
        return classes[kind].from_config(config)


def run(run: Run) -> None:
    """Write `lora/NAME.safetensors` for `pipeline.load_lora_weights` of the exported pipeline.

    The names of dropped modules are stored in `lora/NAME.json`. Raises `UsageError` if there is no exported model, if
    the file is no LoRA, or if an earlier result has other settings.
    """
    path = Path(str(run.config.lora.path))
    target = run.folder / "lora" / f"{path.stem}.safetensors"
    transformer = _pruned_transformer(run)
    made_from = {
        "lora": str(path.resolve()),
        "size": path.stat().st_size,
        "modified": path.stat().st_mtime_ns,
        "source": run.config.lora.source,
        "model": transformer.config.get("ppcl", {}).get("fingerprint"),
    }
    header = Header("ppcl.lora", made_from)
    if is_current(target.with_suffix(".json"), header, "delete that file to make it anew", [target]):
        read_tensors(target, "remap_lora")
        run.say("remap_lora", f"reused {target}")
        return
    state, peft = read_lora(run, path)
    found = remap_lora(state, transformer, source=run.config.lora.source, metadata=peft)
    metadata = {METADATA_KEY: json.dumps(adapter_metadata(found.state, transformer)), "format": "pt"}
    write_tensors(target, found.state, metadata)
    write_json(target.with_suffix(".json"), header.to_json() | {"dropped": found.dropped})
    modules = len({key.split(".lora_")[0] for key in found.state})
    run.say(
        "remap_lora", f"{modules} modules mapped, {len(found.dropped)} dropped: the pruned model has no place for them"
    )
    if found.dropped:
        few = ", ".join(found.dropped[:3])
        run.say("remap_lora", f"dropped: {few}{', ...' if len(found.dropped) > 3 else ''}; all in {target.stem}.json")
    run.say("remap_lora", f"wrote {target}; pipeline.load_lora_weights takes it")
