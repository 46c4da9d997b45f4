"""Pretrain an embedded toy teacher by flow matching, from random weights or from an earlier teacher."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ppcl.artifacts.files import atomic_folder, read_json, write_json
from ppcl.artifacts.folders import check_model, list_files
from ppcl.artifacts.headers import Header, is_current
from ppcl.context import Run
from ppcl.data.batches import StepLoader
from ppcl.data.streams import ShapesStream, WorldEncoder
from ppcl.distill.pretrain import Pretrain
from ppcl.families.registry import builders
from ppcl.options import identity
from ppcl.paths import local_folder
from ppcl.training.loop import check_resumable, discard_checkpoint, fit


def teacher_header(run: Run) -> Header:
    """Return the header of a pretrained teacher, which lists everything that its weights depend on.

    An earlier teacher (`pretrain.init`) is listed by its fingerprint, so that its folder can move.
    """
    config = run.config.pretrain
    settings = identity(config)
    if config.init is not None:
        settings["init"] = read_json(local_folder(config.init) / "ppcl.json", "pretrain.init:")["fingerprint"]
    made_from = {
        "builder": run.config.model.builder,
        "seed": run.config.data.train_seed,
        "pretrain": settings,
        "data": run.data.identity,
    }
    return Header("ppcl.teacher", made_from)


def _start(run: Run) -> Any:
    """Return the pipeline to train: a new one, an earlier one, or a new one with another family's weights."""
    config = run.config.pretrain
    build = import_module(builders()[str(run.config.model.builder)]).build_pipeline
    settings: dict[str, Any] = {} if config.num_layers is None else {"num_layers": config.num_layers}
    if run.config.model.categories is not None:
        settings["categories"] = run.config.model.categories
    pipeline = build(run.config.data.train_seed, **settings)
    if config.init is None:
        run.family.initialize(pipeline.transformer)
        return pipeline
    earlier = DiffusionPipeline.from_pretrained(local_folder(config.init), dtype=torch.float32)
    same = type(earlier) is type(pipeline)
    if same and run.config.model.categories is None:
        return earlier  # its text encoder too: the transformer was trained on those embeddings
    pipeline.transformer.load_state_dict(earlier.transformer.state_dict())
    if same:
        _take_words(pipeline, earlier)
    return pipeline


@torch.no_grad()
def _take_words(pipeline: Any, earlier: Any) -> None:
    """Give a pipeline the text encoder of an `earlier` one whose tokenizer may have other words.

    Embeddings are copied by token. A new token keeps the embedding that it has.
    """
    ids, earlier_ids = pipeline.tokenizer.get_vocab(), earlier.tokenizer.get_vocab()
    common = sorted(ids.keys() & earlier_ids.keys())
    rows, source = ([table[token] for token in common] for table in (ids, earlier_ids))
    own, state = pipeline.text_encoder.state_dict(), earlier.text_encoder.state_dict()
    for name, value in own.items():
        if len(value) == len(state[name]):
            value.copy_(state[name])
        else:  # the embeddings, and the head, which nothing uses
            value[rows] = state[name][source]


def run(run: Run) -> None:
    """Train the teacher and write it to `teacher/` as a pipeline folder.

    A killed training resumes from its last checkpoint. Raises `UsageError` if `teacher/` or the checkpoint was made
    with other settings.
    """
    config, folder = run.config.pretrain, run.folder / "teacher"
    header = teacher_header(run)
    if is_current(folder / "ppcl.json", header):
        check_model(folder, read_json(folder / "ppcl.json", "The record", "pretrain"), "pretrain")
        run.say("pretrain", f"reused {folder}")
        return
    checkpoints = run.folder / "pretrain-checkpoint"
    check_resumable(checkpoints, header)
    pipeline = _start(run)
    run.family.complete(pipeline)
    data = run.config.data
    prompts = text_encoder = None
    if config.text_encoder_lr is not None:
        text_encoder, prompts = pipeline.text_encoder.requires_grad_(), WorldEncoder(run.family, pipeline)
    stream = ShapesStream(
        run.family, pipeline, data, data.train_seed, config.batch_size, prompts, categories=config.categories
    )
    module = Pretrain(
        run.family,
        pipeline.transformer,
        stream,
        text_encoder,
        max_steps=config.steps,
        muon_lr=config.muon_lr,
        adam_lr=config.adam_lr,
        text_encoder_lr=config.text_encoder_lr,
        warmup_steps=config.warmup_steps,
        decay=config.decay,
        precision=run.precision,
    )
    loader = StepLoader(int, config.steps)  # the steps' numbers, of which they make their batches
    blocks = run.family.blocks(pipeline.transformer).values()
    fit(run, "pretrain", module, loader, checkpoints, header, config, blocks)
    # bfloat16 halves the size, and pictures show no difference. The text encoder stays float32, since the
    # transformer was trained on exactly its embeddings.
    pipeline.transformer.to("cpu", torch.bfloat16)
    with atomic_folder(folder) as temporary:
        pipeline.save_pretrained(temporary)
        write_json(temporary / "ppcl.json", header.to_json() | list_files(temporary))
    discard_checkpoint(run, checkpoints)
    run.say("pretrain", f"wrote {folder}")
