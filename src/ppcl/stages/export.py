"""Write the pruned pipeline as a folder that `DiffusionPipeline.from_pretrained` loads.

A model that is pruned only in depth has the stock transformer class of diffusers. One that is pruned in width has a
class of its own, whose code is in the folder. On request this stage also writes a single file for ComfyUI, and uploads
the results to the Hugging Face Hub.
"""

from __future__ import annotations

from pathlib import Path

from ppcl.artifacts.files import atomic_folder, atomic_path, read_json, write_json
from ppcl.artifacts.folders import check_model, list_files
from ppcl.artifacts.headers import Header, is_current
from ppcl.artifacts.scores import ComparedRow
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.export.folder import BaseModel, forget_paths, keep_own_files, model_card_of, provenance_of
from ppcl.export.model_card import (
    evaluation_section,
    single_file_section,
    with_section,
)
from ppcl.export.remote_code import add_code
from ppcl.export.single_file import check_single_file, modelspec, read_metadata, write_single_file
from ppcl.validation.outputs import refuse_single_file
from ppcl.variants.plugs import Plugs
from ppcl.variants.switch import Switch
from ppcl.variants.variants import Variant, another_run, furthest, made_of, variants_of

SINGLE_FILE = "export.safetensors"  # in the run's folder, next to `export/`


def run(run: Run) -> None:
    """Write `export/`, then the single file, the model card and the upload, as far as they are asked for.

    Raises `UsageError` if an export with other settings is in the way, or if a single file is asked for and the model
    is pruned in width.
    """
    config, folder = run.config.export, run.folder / "export"
    name = config.variant or furthest(run)
    (variant,), plugs = variants_of(run, [name])
    if config.single_file and variant.projectors:
        refuse_single_file(f"which plugs in {variant.projectors[0]}")
    made_from = {
        "model": run.teacher.identity,
        "variant": name,
        "finetuned": variant.finetuned,
    } | made_of(variant, plugs)
    if config.max_shard_size is not None:
        made_from["max_shard_size"] = config.max_shard_size
    header = Header("ppcl.export", made_from)
    single = _SingleFile(run, header) if config.single_file else None
    if is_current(folder / "ppcl.json", header, another_run(run, folder, variant)):
        check_model(folder, read_json(folder / "ppcl.json", "The record", "export"), "export")
        run.say("export", f"reused {folder}")
    else:
        _write_folder(run, folder, variant, plugs, header)
    if not variant.finetuned and run.base != run.folder and (run.base / "finetuned" / "ppcl.json").exists():
        run.say("export", f"this is {name}, untuned: the tuned model of {run.base} is exported by run={run.base}")
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
    """Write the pipeline with `variant` as its transformer, its model card and its record, all or nothing."""
    switch = Switch(run, plugs)
    model = switch.standalone(variant)
    provenance = provenance_of(run, variant, switch, header)
    model.register_to_config(ppcl=provenance)
    with atomic_folder(folder) as temporary:
        try:
            run.teacher.transformer = model
            run.teacher.pipeline.save_pretrained(temporary, max_shard_size=run.config.export.max_shard_size)
            card = model_card_of(run, switch, variant.name, sum(parameter.numel() for parameter in model.parameters()))
        finally:
            switch.restore()
        (temporary / "README.md").write_text(card, encoding="utf-8")
        keep_own_files(run, temporary)
        add_code(temporary)
        forget_paths(temporary, provenance["base_model"])
        write_json(temporary / "ppcl.json", header.to_json() | provenance | list_files(temporary))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    run.say(
        "export", f"wrote {variant.name} to {folder} ({size / 1e6:.1f} MB); DiffusionPipeline.from_pretrained loads it"
    )


class _SingleFile:
    """Writes `export.safetensors`, the transformer in one file for ComfyUI, from the exported folder.

    Raises `UsageError` if the file exists and was made from another export or in another dtype.
    """

    def __init__(self, run: Run, export: Header) -> None:
        self.run, self.dtype = run, run.config.export.single_file_dtype
        self.path = run.folder / SINGLE_FILE
        self.header = Header("ppcl.single_file", {"export": export.fingerprint, "dtype": self.dtype})
        self.exists = self.path.exists()
        # The fingerprint in its metadata is enough: the file gets its name only after it is written completely.
        if self.exists and read_metadata(self.path).get("ppcl.fingerprint") != self.header.fingerprint:
            raise UsageError(
                f"{self.path} was made from another export or with another export.single_file_dtype than "
                f"{self.dtype}: give this run another name=, or delete that file to make it anew."
            )

    def write(self, folder: Path) -> None:
        """Write the file from the transformer of the export `folder`, unless it exists."""
        run = self.run
        if self.exists:
            check_single_file(self.path)
            run.say("export", f"reused {self.path}")
            return
        base, (height, width) = BaseModel.of(run), run.config.model.sampling.size
        weights = folder / run.teacher.component
        config = read_json(weights / "config.json", "The transformer's config")
        kept = config["ppcl"]["kept_layers"]
        facts = {
            "title": base.title,
            "description": f"{base.name} with {sum(run.num_layers.values())} blocks pruned to "
            f"{sum(map(len, kept.values()))} (arXiv 2511.16156)",
            "resolution": f"{width}x{height}",
            "base_model": base.name,
            "fingerprint": self.header.fingerprint,
        }
        if base.licence:
            facts["license"] = base.licence.get("license_name", base.licence["license"])
        metadata = modelspec(run.config.model.family, config, facts)
        size = write_single_file(weights, self.path, run.config.model.family, self.dtype, metadata)
        run.say("export", f"wrote {self.path} ({size / 1e6:.1f} MB), which ComfyUI loads as a diffusion model")


def _complete_card(run: Run, path: Path, variant: str) -> None:
    """Update two sections of the model card at `path`: the use of the single file, and the scores of `variant`.

    The first is removed if there is no single file. The scores stay as they are if this run has no current ones.
    """
    if not path.exists() or not path.stat().st_size:
        raise UsageError(f"{path} does not exist or is empty: delete {path.parent} and run 'stages=[export]' again.")
    card = path.read_text(encoding="utf-8")
    layers = read_json(path.parent / "ppcl.json", "The record", "export")["kept_layers"].values()
    usage = single_file_section(run.config.model.family, sum(map(len, layers)))
    changed = with_section(card, "single file", usage if (run.folder / SINGLE_FILE).exists() else "")
    # If this command also evaluates, it does so after this stage, so scores that exist now may be outdated. Scores of
    # pictures that the teacher helped to draw are not those of the exported model.
    helped = run.config.generate.teacher_above is not None
    rows = [] if helped or "evaluate" in run.config.stages else _scores(run, variant)
    if rows:
        changed = with_section(changed, "evaluation", evaluation_section(rows, run.benchmark.label))
    if changed != card:
        with atomic_path(path) as temporary:
            temporary.write_text(changed, encoding="utf-8")


def _scores(run: Run, variant: str) -> list[ComparedRow]:
    """Return the scores of the teacher and of `variant`, or none if the current configuration has no valid ones."""
    if not (run.folder / "scores").exists():
        return []
    from ppcl.pictures.scores import read_rows

    try:
        return read_rows(run, ["teacher", variant])
    except UsageError as error:
        run.say("export", f"the scores do not go into the model card: {error}")
        return []
