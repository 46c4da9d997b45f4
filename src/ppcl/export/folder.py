"""Chooses the variant to export, and describes it: provenance for the config, and the model card."""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl import __version__
from ppcl.artifacts.files import parse_json, write_json
from ppcl.artifacts.headers import Header
from ppcl.components import other_denoisers
from ppcl.context import Run
from ppcl.export.model_card import (
    Code,
    card_metadata,
    hub_id,
    license_of,
    model_card,
)
from ppcl.paths import EMBEDDED
from ppcl.pictures.outputs import field_of
from ppcl.surgery.provenance import earlier_of
from ppcl.validation.model import model_folder
from ppcl.variants.switch import Switch
from ppcl.variants.variants import Variant


def provenance_of(run: Run, variant: Variant, switch: Switch, header: Header) -> dict[str, Any]:
    """Return the `ppcl` entry of an export's config: which blocks were kept, and how the model was made.

    Blocks are counted as in the full model, also if the teacher was pruned from that itself.
    """
    config = run.config
    board = switch.board
    blocks, teacher = board.blocks, board.teacher_blocks
    width = {
        stack: {kind: [teacher.kept[stack][index] for index in indices] for kind, indices in sets.items()}
        for stack, sets in board.width.items()
    }
    earlier = {}
    if teacher.renumbered:  # LoRAs may count the blocks of the teacher, or of one before it
        earlier["pruned_from"] = [*earlier_of(switch.teacher.config.get("ppcl")), teacher.kept]
    return {
        "version": __version__,
        "base_model": base_name(run),
        "revision": config.model.revision,
        "variant": variant.name,
        "kept_layers": blocks.kept,
        "removed_intervals": blocks.removed,
        **earlier,
        "width": width,
        "method": config.method.name,
        "distill": "none"
        if config.distill.mode == "none"
        else f"{config.distill.mode}, init {config.distill.init}, {config.distill.steps} steps",
        "finetune": f"{config.finetune.steps} steps" if variant.finetuned else None,
        "data": config.data.name,
        "fingerprint": header.fingerprint,
    }


def base_name(run: Run) -> str | None:
    """Return what an export calls its teacher: its id on the Hub, `embedded:NAME`, or the name of its folder.

    The folder's path is of this machine, and nobody else's business. None without weights.
    """
    path, folder = run.config.model.path, model_folder(run.config.model)
    if path is None or path.startswith(EMBEDDED):
        return path
    return hub_id(path, folder) or (path if folder is None else folder.resolve().name)


def forget_paths(folder: Path, base: str | None) -> None:
    """Replace paths of this machine by `base` in the configs of a saved pipeline, where diffusers notes its source."""
    for path in [*folder.glob("*.json"), *folder.glob("*/*.json")]:
        if not path.name.endswith(("config.json", "index.json")):
            continue
        config = parse_json(path.read_text(encoding="utf-8"))  # settings of schedulers may be -Infinity
        for key in ("_name_or_path", "name_or_path"):
            if isinstance(config.get(key), str) and Path(config[key]).is_absolute():
                config[key] = base or ""
                write_json(path, config, checked=False)


def keep_own_files(run: Run, folder: Path) -> None:
    """Replace saved tokenizers, processors and other denoisers of the pipeline in `folder` by the teacher's own files.

    Encoding captions leaves a length and a padding in a tokenizer, which it would save. What is exported must not
    depend on the stages that ran before. A denoiser that is not pruned would be saved in `model.dtype`, and under other
    names if `model.variant` is set; then it is left so.
    """
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    others = other_denoisers(run.teacher.pipeline, run.teacher.component) if run.config.model.variant is None else {}
    for name, part in run.teacher.pipeline.components.items():
        if name in others or isinstance(part, PreTrainedTokenizerBase | ProcessorMixin):
            own = run.teacher.files.part(name)
            if own.is_dir():
                shutil.rmtree(folder / name)
                shutil.copytree(own, folder / name)


@dataclass(frozen=True)
class BaseModel:
    """The model that was pruned: its id on the Hub or None, its name, and the licence fields of its model card."""

    hub_id: str | None
    name: str
    licence: dict[str, str]

    @classmethod
    def of(cls, run: Run) -> BaseModel:
        config = run.config.model
        folder = model_folder(config)
        found = hub_id(str(config.path), folder)
        name = found or (folder.resolve().name if folder is not None else config.name)
        return cls(found, name, license_of(config.family, found, folder))

    @property
    def title(self) -> str:
        return f"{self.name.rpartition('/')[2]} pruned by PPCL"


def model_card_of(run: Run, switch: Switch, variant: str, params: int) -> str:
    """Return the model card of an export of `variant`, whose transformer has `params` parameters."""
    config, sampling, board = run.config, run.config.model.sampling, switch.board
    ours = any(type(part).__module__ == "ppcl" for part in run.teacher.pipeline.components.values())
    base = BaseModel.of(run)
    labels = getattr(run.teacher.pipeline, "labels", None)  # only a class-conditional model has them
    prompt = next(iter(labels)) if labels else "a red circle and a blue square"
    picture = Code('load_image("PATH_OR_URL")')
    given = [[picture] * run.family.num_references] if run.family.num_references else []
    call, field = None, None
    if run.family.draws:
        field = field_of(run.teacher.pipeline)
        call = run.family.prompt_arguments(run.teacher.pipeline, [prompt], given)
        call |= run.family.sampling_arguments(sampling, 1)
        image = inspect.signature(type(run.teacher.pipeline).__call__).parameters.get("image")
        if image is not None and image.default is inspect.Parameter.empty and "image" not in call:
            call |= {"image": picture}
    parts = run.teacher.pipeline.components
    missing = [name for name in parts if parts[name] is None and name not in run.teacher.pipeline._optional_components]
    return model_card(
        {
            "title": base.title,
            "metadata": card_metadata(
                run.family.name, base.hub_id, base.licence, field, given="load_image" in repr(call)
            ),
            "base": base.name,
            "version": __version__,
            "variant": variant,
            "dtype": config.model.dtype,
            "teacher_layers": sum(run.num_layers.values()),
            "student_layers": sum(len(kept) for kept in board.kept.values()),
            "teacher": switch.teacher_size,
            "student": params,
            # diffusers finds a component class of ppcl only if ppcl is imported
            "imports": "import ppcl  # or pass trust_remote_code=True below\n" if ours else "",
            "without": "".join(f", {name}=None" for name in missing),
            "call": call,
            "field": field or "images",
            "preparation": run.family.preparation,
            "seed": config.seed,
            "component": run.teacher.component,
            "intervals": json.dumps(board.blocks.removed),
            "students": len(board.plugged),
            "width_sets": json.dumps(board.width) if board.width else "none",
            "method": config.method.name,
            "kept_layers": json.dumps(board.blocks.kept),
        }
    )
