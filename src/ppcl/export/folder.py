"""Chooses the variant to export, and describes it: provenance for the config, and the model card."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl import __version__
from ppcl.artifacts.headers import Header
from ppcl.context import Run
from ppcl.export.model_card import (
    Code,
    card_metadata,
    hub_id,
    license_of,
    model_card,
)
from ppcl.validation.model import model_folder
from ppcl.variants.switch import Switch
from ppcl.variants.variants import Variant


def provenance_of(run: Run, variant: Variant, switch: Switch, header: Header) -> dict[str, Any]:
    """Return the `ppcl` entry of an export's config: which blocks were kept, and how the model was made."""
    config = run.config
    board = switch.board
    return {
        "version": __version__,
        "base_model": BaseModel.of(run).hub_id or config.model.path,
        "revision": config.model.revision,
        "variant": variant.name,
        "kept_layers": board.kept,
        "removed_intervals": board.removed_intervals,
        "width": board.width,
        "method": config.method.name,
        "distill": "none"
        if config.distill.mode == "none"
        else f"{config.distill.mode}, init {config.distill.init}, {config.distill.steps} steps",
        "finetune": f"{config.finetune.steps} steps" if variant.finetuned else None,
        "data": config.data.name,
        "fingerprint": header.fingerprint,
    }


def keep_own_files(run: Run, folder: Path) -> None:
    """Replace the saved tokenizers and processors of the pipeline in `folder` by the teacher's own files.

    Encoding captions leaves a length and a padding in a tokenizer, which it would save. What is exported must not
    depend on the stages that ran before.
    """
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    for name, part in run.teacher.pipeline.components.items():
        if isinstance(part, PreTrainedTokenizerBase | ProcessorMixin):
            own = run.teacher.own_files(name)
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
    given = [[Code('load_image("PATH_OR_URL")')] * run.family.num_references] if run.family.num_references else []
    call = None
    if run.family.draws:
        call = run.family.prompt_arguments(run.teacher.pipeline, [prompt], given)
        call |= run.family.sampling_arguments(sampling, 1)
    parts = run.teacher.pipeline.components
    missing = [name for name in parts if parts[name] is None and name not in run.teacher.pipeline._optional_components]
    return model_card(
        {
            "title": base.title,
            "metadata": card_metadata(run.family.name, base.hub_id, base.licence, draws=run.family.draws),
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
            "seed": config.seed,
            "intervals": json.dumps(switch.board.removed_intervals),
            "students": len(board.plugged),
            "width_sets": json.dumps(board.width) if board.width else "none",
            "method": config.method.name,
            "kept_layers": json.dumps(board.kept),
        }
    )
