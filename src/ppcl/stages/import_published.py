"""Import what the PPCL authors published.

A model becomes a pipeline folder, and a training checkpoint becomes the students and projectors of this run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ppcl import __version__
from ppcl.artifacts.files import atomic_folder, read_json, write_json
from ppcl.artifacts.folders import check_model, list_files
from ppcl.artifacts.headers import Header, is_current
from ppcl.artifacts.plan import plug_name
from ppcl.artifacts.plugs import Plug, Projector
from ppcl.context import Run
from ppcl.export.folder import base_name, forget_paths
from ppcl.export.remote_code import add_code
from ppcl.families.qwen_image.published import (
    INDEX,
    STACK,
    PublishedFolder,
    convert,
    lost,
)
from ppcl.families.qwen_image.published_training import Training
from ppcl.layers import Layout, kept_layers
from ppcl.report.text import billions
from ppcl.validation.model import num_layers
from ppcl.validation.pruning import resolve_intervals
from ppcl.validation.published import open_source

SINGLE_FILE = "diffusion_pytorch_model.safetensors"


def run(run: Run) -> None:
    """Write `imported/` from a published model, or `plugs/` from a training checkpoint.

    Raises `UsageError` if the source cannot be read, does not fit the configuration, or if existing files were imported
    from another source.
    """
    source = open_source(run.config)
    if isinstance(source, Training):
        _write_plugs(run, source)
    else:
        _write_model(run, source)


def _state_of(path: Path) -> list[int]:
    """Return size and modification time of a file, by which a change of the file is detected."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


# A model.


def _write_model(run: Run, source: PublishedFolder) -> None:
    """Convert a published model to `imported/`.

    A model of the stock class is converted only if `intervals` are given, since diffusers loads it as it is. The
    intervals say which blocks of the full model it has kept, so that LoRAs and ControlNets of the full model can be
    mapped to it.
    """
    published, path = source.published, Path(str(run.config.published.path))
    intervals = resolve_intervals(run.config)
    if published.is_stock and intervals is None:
        run.say(
            "import_published",
            f"{path} is the stock class with {published.num_layers} blocks: diffusers loads it as it is, so nothing is "
            "written; with intervals= it is, and takes the full model's LoRAs and ControlNets",
        )
        return
    folder = run.folder / "imported"
    made_from = {
        "published": str(path.resolve()),
        "config": source.config,
        "files": {file.name: _state_of(file) for file in source.files},
        "residual": not published.plain,
        "keep_text_query": run.layout.keep_text_query,
        "intervals": None if intervals is None else [list(pair) for pair in intervals.get(STACK, [])],
    }
    header = Header("ppcl.imported", made_from)
    if is_current(folder / "ppcl.json", header):
        check_model(folder, read_json(folder / "ppcl.json", "The record"), "import_published")
        run.say("import_published", f"reused {folder}")
        return
    facts = _text_projector_facts(run, source)
    with torch.device("meta"):
        model = published.model_class.from_config(published.arch)
    provenance = _provenance(run, source, header)
    if intervals is not None:  # without intervals it is unknown which blocks of the full model were kept
        model.register_to_config(ppcl=provenance)
    with atomic_folder(folder) as temporary:
        model.save_config(temporary / "transformer")
        _write_weights(run, source, temporary / "transformer")
        _write_pipeline(source, temporary, ours=bool(published.text or published.ffn))
        forget_paths(temporary, base_name(run))
        write_json(temporary / "ppcl.json", header.to_json() | provenance | facts | list_files(temporary))
    _tell(run, source, folder)


def _text_projector_facts(run: Run, source: PublishedFolder) -> dict[str, Any]:
    """Return how the text projectors were read, and the mean of their diagonals as evidence.

    The diagonal of a plain map x -> W x is around 1, that of a residual map x -> x + W x around 0.
    """
    if not source.published.text:
        return {}
    weights = list(source.text_projectors())
    diagonal = torch.stack([weight.diagonal().float().mean() for weight in weights]).mean().item()
    plain = bool(source.published.plain)
    facts: dict[str, Any] = {"txt_proj": "plain" if plain else "residual", "txt_proj_mean_diagonal": diagonal}
    told = f"txt_proj read as {facts['txt_proj']} maps, mean diagonal {diagonal:.2f} (plain: around 1, residual: 0)"
    if plain:
        facts["txt_proj_rounded_off"] = max(map(lost, weights))
        told += f"; W - I rounds off at most {facts['txt_proj_rounded_off']:.1e} of W"
    run.say("import_published", told)
    return facts


def _provenance(run: Run, source: PublishedFolder, header: Header) -> dict[str, Any]:
    """Return what the exported config says about the model: its base model and the blocks that were pruned."""
    config, published, intervals = run.config, source.published, resolve_intervals(run.config)
    found = {"version": __version__, "variant": "imported", "fingerprint": header.fingerprint}
    if intervals is None:
        return found
    pairs = intervals.get(STACK, [])
    kept = kept_layers(num_layers(config)[STACK], pairs)
    width = {"text": [kept[place] for place in published.text], "ffn": [kept[place] for place in published.ffn]}
    return found | {
        "base_model": base_name(run),
        "revision": config.model.revision,
        "kept_layers": {STACK: kept},
        "removed_intervals": {STACK: [list(pair) for pair in pairs]},
        "width": {STACK: width} if any(width.values()) else {},
    }


def _write_weights(run: Run, source: PublishedFolder, folder: Path) -> None:
    """Convert the weights file by file, so that only one file is in memory at a time."""
    names = {file: file.name if len(source.files) > 1 else SINGLE_FILE for file in source.files}
    index: dict[str, str] = {}
    size = 0
    for file in run.track(source.files, "converting"):
        state = dict(convert(source.published, source.tensors(file)))
        save_file(state, folder / names[file], {"format": "pt"})
        index |= dict.fromkeys(state, names[file])
        size += sum(value.nbytes for value in state.values())
        del state
    if len(names) > 1:
        content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}
        write_json(folder / INDEX, content, checked=False)


def _write_pipeline(source: PublishedFolder, folder: Path, ours: bool) -> None:
    """Write the rest of the pipeline to `folder`: the other components, the transformer's code and `model_index.json`.

    `ours`: whether the transformer's class is one of ppcl, not of diffusers.
    """
    index: dict[str, Any] = {}
    if source.pipeline is not None:
        index = read_json(source.pipeline / "model_index.json", "The pipeline's index")
        for item in sorted(source.pipeline.iterdir()):
            if item.is_dir() and isinstance(index.get(item.name), list) and item.name != "transformer":
                shutil.copytree(item, folder / item.name)
            elif item.is_file() and item.name.upper().startswith(("LICENSE", "NOTICE")):
                shutil.copyfile(item, folder / item.name)
    config = read_json(folder / "transformer" / "config.json", "The converted config")
    index["transformer"] = ["ppcl" if ours else "diffusers", config["_class_name"]]
    write_json(folder / "model_index.json", index, checked=False)
    add_code(folder)
    if source.pipeline is None:  # the index was needed only to add the code
        (folder / "model_index.json").unlink()


def _tell(run: Run, source: PublishedFolder, folder: Path) -> None:
    """Print the size of the imported model and how to load it."""
    published = source.published
    sizes = {key: torch.Size(shape).numel() for key, shape in published.shapes.items()}
    added = sum(sizes[key] for key in published.identity)
    run.say(
        "import_published",
        f"{published.num_layers} blocks, {len(published.text)} without a text stream, {len(published.ffn)} without "
        f"FFN: {published.model_class.__name__} with {billions(sum(sizes.values()))} parameters"
        + (f", {billions(added)} of them output projectors that it had none of (zero)" if added else ""),
    )
    loads = f"DiffusionPipeline.from_pretrained({json.dumps(str(folder))})"
    if source.pipeline is None:
        target = json.dumps(str(folder / "transformer"))
        loads = f"{published.model_class.__name__}.from_pretrained({target})"
    run.say("import_published", f"wrote {folder}; {loads} loads it")


# A training checkpoint.


def _write_plugs(run: Run, training: Training) -> None:
    """Write the students and projectors of a training checkpoint to `plugs/`, unless they exist."""
    path, folder = Path(str(run.config.published.path)), run.plugs_folder
    made_from = {
        "model": run.teacher.identity,
        "published": str(path.resolve()),
        "file": _state_of(path),
        "intervals": [list(pair) for pair in training.students],
    }
    parts: list[Plug | Projector] = []
    students: dict[int, Plug] = {}
    for number, (pair, state) in enumerate(training.students.items()):
        entry = {"entries": [f"transformer_distill_blocks.{number}"], "interval": list(pair)}
        students[pair[0]] = Plug(Header("ppcl.plug", made_from | entry), STACK, state, {}, pair)
        parts.append(students[pair[0]])
    for item in training.projectors:
        base, reference = students.get(item.index), students.get(-1 if item.reference is None else item.reference)
        entry = {
            "entries": item.entries,
            "projector": f"{STACK}.{item.index}.{item.kind}",
            "base": base.header.fingerprint if base else None,
            "reference": [item.reference, reference.header.fingerprint if reference else None],
            "text_output": Layout().text_output,
            "ehs_same": run.config.published.ehs_same if item.kind == "text" else None,
        }
        projector = Projector(
            Header("ppcl.projector", made_from | entry),
            STACK,
            item.state_dict,
            {},
            index=item.index,
            kind=item.kind,
            base=plug_name(STACK, base.interval) if base else None,
            reference=item.reference,
        )
        parts.append(projector)
    stale = [part for part in parts if not is_current(folder / f"{part.name}.json", part.header)]
    for part in run.track(stale, "writing plugs"):
        part.save(folder)
    told = f"{len(training.students)} students, {len(training.projectors)} projectors"
    run.say("import_published", f"wrote {told} to {folder}" if stale else f"reused {folder}")
