"""Writes the pruned pipeline as a folder that diffusers loads: the stock class, or ours with its code beside it."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ppcl import __version__
from ppcl._diffusers import MODELS
from ppcl.artifacts import Header, atomic_folder, is_current, read_json, write_json
from ppcl.export.model_card import model_card
from ppcl.stages.run import Run
from ppcl.stages.variants import Switch, Variant, finetuned_folder, variants_of
from ppcl.validation import budget_of


def furthest(run: Run) -> str:
    """The variant that a run has come to: tuned, planned, pruned in width, or in depth alone."""
    if (finetuned_folder(run) / "ppcl.json").exists():
        return "ppcl-finetuned"
    if budget_of(run.config) is not None:
        return "ppcl-planned"
    return "ppcl-depth" if run.config.width.source == "none" else "ppcl-width"


def add_code(folder: Path) -> None:
    """Put the source of every component class of ours beside its weights, and name it in the folder's indices.

    diffusers runs it with `trust_remote_code=True`, and without where ppcl is imported.
    """
    files = {name: import_module(f"ppcl.models.{name}") for name in MODELS}
    index = read_json(folder / "model_index.json", "The pipeline's index")
    for component, entry in index.items():
        if not isinstance(entry, list) or entry[0] != "ppcl":
            continue
        name = next(name for name, module in files.items() if hasattr(module, entry[1]))
        (folder / component / f"{name}.py").write_text(_self_contained(files[name]), encoding="utf-8")
        index[component] = [name, entry[1]]
        config = read_json(folder / component / "config.json", "The component's config")
        write_json(folder / component / "config.json", config | {"auto_map": {"AutoModel": f"{name}.{entry[1]}"}})
    write_json(folder / "model_index.json", index)


def _self_contained(module: ModuleType) -> str:
    """Its source with what it imports from ppcl put in place: diffusers fetches one file per component."""

    def source_of(module: ModuleType) -> str:
        return Path(str(module.__file__)).read_text(encoding="utf-8")

    def definitions(found: re.Match) -> str:
        return source_of(import_module(found[1])).partition("\n\n\n")[2].rstrip() + "\n"

    return re.sub(r"^from (ppcl\S*) import .+\n", definitions, source_of(module), flags=re.MULTILINE)


def _provenance(run: Run, variant: Variant, switch: Switch, header: Header) -> dict[str, Any]:
    config = run.config
    board = switch.board
    return {
        "version": __version__,
        "base_model": config.model.path,
        "revision": config.model.revision,
        "variant": variant.name,
        "kept_layers": board.kept,
        "removed_intervals": board.removed_intervals,
        "width": board.width,
        "method": config.method.name,
        "distill": f"{config.distill.mode}, init {config.distill.init}, {config.distill.steps} steps",
        "finetune": f"{config.finetune.steps} steps" if variant.finetuned else None,
        "data": config.data.name,
        "fingerprint": header.fingerprint,
    }


def run(run: Run) -> None:
    folder = run.folder / "export"
    name = run.config.export.variant or furthest(run)
    (variant,), plugs = variants_of(run, [name])
    made_from = {
        "model": run.model_identity,
        "variant": name,
        "plugs": plugs.fingerprints([*variant.students, *variant.projectors]),
        "finetuned": variant.finetuned,
    }
    header = Header("ppcl.export", made_from)
    if is_current(folder / "ppcl.json", header):
        run.say("export", f"reused {folder}")
        return
    pipeline = run.pipeline
    switch = Switch(run, plugs)
    switch(variant)
    model = switch.finetuned if variant.finetuned else switch.board.standalone()
    provenance = _provenance(run, variant, switch, header)
    model.register_to_config(ppcl=provenance)
    with atomic_folder(folder) as temporary:
        try:
            pipeline.transformer = model
            pipeline.save_pretrained(temporary)
            card = _card(run, switch, name, sum(parameter.numel() for parameter in model.parameters()))
        finally:
            switch.restore()
        (temporary / "README.md").write_text(card, encoding="utf-8")
        add_code(temporary)
        write_json(temporary / "ppcl.json", header.to_json() | provenance)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    run.say("export", f"wrote {name} to {folder} ({size / 1e6:.1f} MB); DiffusionPipeline.from_pretrained loads it")


def _card(run: Run, switch: Switch, variant: str, params: int) -> str:
    config, sampling, board = run.config, run.config.model.sampling, switch.board
    ours = any(type(part).__module__ == "ppcl" for part in run.pipeline.components.values())
    teacher = switch.teacher_size
    return model_card(
        {
            "title": f"{config.model.name} pruned by PPCL",
            "license": "apache-2.0",
            "base_model": config.model.path,
            "family": run.family.name,
            "version": __version__,
            "variant": variant,
            "dtype": config.model.dtype,
            "teacher_layers": sum(run.num_layers.values()),
            "student_layers": sum(len(kept) for kept in board.kept.values()),
            "teacher": teacher,
            "student": params,
            # diffusers loads a class of another package only where that package is imported
            "imports": "import ppcl  # or pass trust_remote_code=True below\n" if ours else "",
            "negative_prompt": sampling.negative_prompt,
            "true_cfg_scale": sampling.true_cfg_scale,
            "num_inference_steps": sampling.num_inference_steps,
            "height": sampling.height,
            "width": sampling.width,
            "seed": config.seed,
            "intervals": json.dumps(switch.board.removed_intervals),
            "students": len(board.plugged),
            "width_sets": json.dumps(board.width) if board.width else "none",
            "method": config.method.name,
            "kept_layers": json.dumps(board.kept),
        }
    )
