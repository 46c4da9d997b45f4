"""Writes the pruned pipeline as a folder that diffusers loads: the stock class, or ours with its code beside it.

On request a single file for ComfyUI is made from that folder, and both go to the Hub.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ppcl import __version__
from ppcl._diffusers import MODELS
from ppcl.artifacts import Header, atomic_folder, atomic_path, is_current, read_json, write_json
from ppcl.errors import UsageError
from ppcl.export.model_card import (
    Code,
    card_metadata,
    evaluation_section,
    hub_id,
    license_of,
    model_card,
    single_file_section,
    with_section,
)
from ppcl.export.single_file import modelspec, read_metadata, write_single_file
from ppcl.stages.run import Run
from ppcl.stages.variants import Plugs, Switch, Variant, finetuned_folder, variants_of
from ppcl.validation.model import model_folder
from ppcl.validation.outputs import refuse_single_file
from ppcl.validation.pruning import budget_of

SINGLE_FILE = "export.safetensors"  # beside the folder


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
        path = folder / component / "config.json"
        if path.exists():  # a processor has none
            config = read_json(path, "The component's config")
            write_json(path, config | {"auto_map": {"AutoModel": f"{name}.{entry[1]}"}})
    write_json(folder / "model_index.json", index)


def _self_contained(module: ModuleType) -> str:
    """Its source with what it imports from ppcl put in place: diffusers fetches one file per component."""

    def source_of(module: ModuleType) -> str:
        return Path(str(module.__file__)).read_text(encoding="utf-8")

    def definitions(found: re.Match) -> str:
        return source_of(import_module(found[1])).partition("\n\n\n")[2].rstrip() + "\n"

    return re.sub(r"^from (ppcl\S*) import .+\n", definitions, source_of(module), flags=re.MULTILINE)


def provenance_of(run: Run, variant: Variant, switch: Switch, header: Header) -> dict[str, Any]:
    config = run.config
    board = switch.board
    return {
        "version": __version__,
        "base_model": _Base.of(run).hub_id or config.model.path,
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
    config, folder = run.config.export, run.folder / "export"
    name = config.variant or furthest(run)
    (variant,), plugs = variants_of(run, [name])
    if config.single_file and variant.projectors:
        refuse_single_file(f"which plugs in {variant.projectors[0]}")
    made_from = {
        "model": run.model_identity,
        "variant": name,
        "plugs": plugs.fingerprints([*variant.students, *variant.projectors]),
        "finetuned": variant.finetuned,
    }
    if config.max_shard_size is not None:
        made_from["max_shard_size"] = config.max_shard_size
    header = Header("ppcl.export", made_from)
    single = _SingleFile(run, header) if config.single_file else None
    if is_current(folder / "ppcl.json", header):
        run.say("export", f"reused {folder}")
    else:
        _write_folder(run, folder, variant, plugs, header)
    if single is not None:
        single.write(folder)
    _complete_card(run, folder / "README.md", name)
    if config.push_to_hub is not None:
        from ppcl.export.hub import push

        run.say("export", f"sends {folder} to {config.push_to_hub}")
        file = None if single is None else single.path
        url = push(
            folder,
            config.push_to_hub,
            single_file=file,
            private=config.private,
            commit_message=config.commit_message,
        )
        run.say("export", f"sent to {url}")


def _write_folder(run: Run, folder: Path, variant: Variant, plugs: Plugs, header: Header) -> None:
    pipeline = run.pipeline
    switch = Switch(run, plugs)
    switch(variant)
    model = switch.finetuned if variant.finetuned else switch.board.standalone()
    provenance = provenance_of(run, variant, switch, header)
    model.register_to_config(ppcl=provenance)
    with atomic_folder(folder) as temporary:
        try:
            pipeline.transformer = model
            pipeline.save_pretrained(temporary, max_shard_size=run.config.export.max_shard_size)
            card = model_card_of(run, switch, variant.name, sum(parameter.numel() for parameter in model.parameters()))
        finally:
            switch.restore()
        (temporary / "README.md").write_text(card, encoding="utf-8")
        add_code(temporary)
        write_json(temporary / "ppcl.json", header.to_json() | provenance)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    run.say(
        "export", f"wrote {variant.name} to {folder} ({size / 1e6:.1f} MB); DiffusionPipeline.from_pretrained loads it"
    )


@dataclass(frozen=True)
class _Base:
    """The base model: its name on the Hub, if it has one, what to call it, and the licence that comes with it."""

    hub_id: str | None
    name: str
    licence: dict[str, str]

    @classmethod
    def of(cls, run: Run) -> _Base:
        config = run.config.model
        folder = model_folder(config)
        found = hub_id(str(config.path), folder)
        name = found or (folder.resolve().name if folder is not None else config.name)
        return cls(found, name, license_of(config.family, found, folder))

    @property
    def title(self) -> str:
        return f"{self.name.rpartition('/')[2]} pruned by PPCL"


class _SingleFile:
    """`export.safetensors` beside the folder, made from it alone: an export that is there is not loaded again."""

    def __init__(self, run: Run, export: Header) -> None:
        self.run, self.dtype = run, run.config.export.single_file_dtype
        self.path = run.folder / SINGLE_FILE
        self.header = Header("ppcl.single_file", {"export": export.fingerprint, "dtype": self.dtype})
        self.exists = self.path.exists()
        # Its header is all the record it needs: the file is renamed when it is whole.
        if self.exists and read_metadata(self.path).get("ppcl.fingerprint") != self.header.fingerprint:
            raise UsageError(
                f"{self.path} was made from another export or with another export.single_file_dtype than "
                f"{self.dtype}: give this run another name=, or delete that file to make it anew."
            )

    def write(self, folder: Path) -> None:
        run = self.run
        if self.exists:
            run.say("export", f"reused {self.path}")
            return
        base, sampling = _Base.of(run), run.config.model.sampling
        config = read_json(folder / "transformer" / "config.json", "The transformer's config")
        kept = config["ppcl"]["kept_layers"]
        facts = {
            "title": base.title,
            "description": f"{base.name} with {sum(run.num_layers.values())} blocks pruned to "
            f"{sum(map(len, kept.values()))} (arXiv 2511.16156)",
            "resolution": f"{sampling.width}x{sampling.height}",
            "base_model": base.name,
            "fingerprint": self.header.fingerprint,
        }
        if base.licence:
            facts["license"] = base.licence.get("license_name", base.licence["license"])
        metadata = modelspec(run.config.model.family, config, facts)
        size = write_single_file(folder / "transformer", self.path, run.config.model.family, self.dtype, metadata)
        run.say("export", f"wrote {self.path} ({size / 1e6:.1f} MB), which ComfyUI loads as a diffusion model")


def _complete_card(run: Run, path: Path, variant: str) -> None:
    """Put into the card what lies beside the folder: how the single file is used, and the scores.

    The rest of the card stays as it is, and so do scores where there are no others.
    """
    card = path.read_text(encoding="utf-8")
    layers = read_json(path.parent / "ppcl.json", "The export's record")["kept_layers"].values()
    usage = single_file_section(run.config.model.family, sum(map(len, layers)))
    changed = with_section(card, "single file", usage if (run.folder / SINGLE_FILE).exists() else "")
    # Where this command evaluates, it does so after this; what is there now may be refused then.
    rows = [] if "evaluate" in run.config.stages else _scores(run, variant)
    if rows:
        changed = with_section(changed, "evaluation", evaluation_section(rows))
    if changed != card:
        with atomic_path(path) as temporary:
            temporary.write_text(changed, encoding="utf-8")


def _scores(run: Run, variant: str) -> list[dict[str, Any]]:
    """What the teacher and `variant` scored in this run, where both were evaluated just as it is configured."""
    records = [run.folder / "scores" / f"{name}.json" for name in ("teacher", variant)]
    if not all(record.exists() for record in records):
        return []
    from ppcl.stages.evaluate import compare, score_headers  # imports what only trainings need

    variants, plugs = variants_of(run, ["teacher", variant])
    try:
        headers = score_headers(run, variants, plugs)
        current = all(is_current(record, headers[record.stem]) for record in records)
    except UsageError as error:
        run.say("export", f"the scores do not go into the model card: {error}")
        return []
    assert current
    return compare([read_json(record, "The scores") for record in records])


def model_card_of(run: Run, switch: Switch, variant: str, params: int) -> str:
    config, sampling, board = run.config, run.config.model.sampling, switch.board
    ours = any(type(part).__module__ == "ppcl" for part in run.pipeline.components.values())
    base = _Base.of(run)
    labels = getattr(run.pipeline, "labels", None)  # of a class-conditional model
    prompt = next(iter(labels)) if labels else "a red circle and a blue square"
    given = [[Code('load_image("PATH_OR_URL")')] * run.family.num_references] if run.family.num_references else []
    call = run.family.prompt_arguments(run.pipeline, [prompt], given)
    return model_card(
        {
            "title": base.title,
            "metadata": card_metadata(run.family.name, base.hub_id, base.licence),
            "base": base.name,
            "version": __version__,
            "variant": variant,
            "dtype": config.model.dtype,
            "teacher_layers": sum(run.num_layers.values()),
            "student_layers": sum(len(kept) for kept in board.kept.values()),
            "teacher": switch.teacher_size,
            "student": params,
            # diffusers loads a class of another package only where that package is imported
            "imports": "import ppcl  # or pass trust_remote_code=True below\n" if ours else "",
            "call": call | run.family.sampling_arguments(sampling, 1),
            "seed": config.seed,
            "intervals": json.dumps(switch.board.removed_intervals),
            "students": len(board.plugged),
            "width_sets": json.dumps(board.width) if board.width else "none",
            "method": config.method.name,
            "kept_layers": json.dumps(board.kept),
        }
    )
