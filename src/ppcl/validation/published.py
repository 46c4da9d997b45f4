"""Checks a published model or training checkpoint against the configuration."""

from __future__ import annotations

from pathlib import Path

from ppcl.config import Config
from ppcl.errors import UsageError
from ppcl.families.qwen_image.published import STACK, PublishedFolder, open_folder
from ppcl.families.qwen_image.published_training import Training, read_training
from ppcl.families.registry import get_family
from ppcl.layers import kept_layers
from ppcl.validation.model import num_layers
from ppcl.validation.pruning import resolve_intervals, resolve_width

SIZES = ("in_channels", "out_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim")


def open_source(config: Config) -> PublishedFolder | Training:
    """Open `published.path` and check it against the configuration, without reading weights.

    Returns a `PublishedFolder` for a folder, a `Training` for the file of a training checkpoint. Raises `UsageError` if
    it does not fit the model, the intervals or the width sets.
    """
    family = get_family(config.model.family, config.model.arch)
    if family.transformer_class.__name__ != "QwenImageTransformer2DModel":
        raise UsageError(
            f"published.path={config.published.path} is read as a Qwen-Image, which the PPCL authors published; "
            f"model={config.model.name} is {config.model.family}: choose model=qwen_image."
        )
    path = Path(str(config.published.path))
    return _open_model(config, path) if path.is_dir() else _open_training(config, path)


def _open_model(config: Config, path: Path) -> PublishedFolder:
    if config.width.source != "none":
        raise UsageError(
            f"published.path={path} has its own width sets: leave out width= (its source is {config.width.source})."
        )
    if config.published.ehs_same is not None:
        raise UsageError(
            f"published.ehs_same is for a training checkpoint, and published.path={path} is a folder: leave it out."
        )
    found = open_folder(path, keep_text_query=config.width.keep_text_query, residual=config.published.residual)
    intervals = resolve_intervals(config)
    if intervals is not None:
        kept = kept_layers(num_layers(config)[STACK], intervals.get(STACK, []))
        if len(kept) != found.published.num_layers:
            raise UsageError(
                f"published.path={path} has {found.published.num_layers} blocks, intervals= leaves {len(kept)} of "
                f"model={config.model.name}: give those that it was pruned by, or none."
            )
        for key in SIZES:
            ours, theirs = config.model.arch.get(key), found.published.arch.get(key)
            if ours is not None and theirs is not None and ours != theirs:
                raise UsageError(
                    f"published.path={path} has {key}={theirs}, model={config.model.name} {ours}: choose the model "
                    "that it was pruned from."
                )
    return found


def _open_training(config: Config, path: Path) -> Training:
    if config.model.path is None:
        raise UsageError(
            f"published.path={path} is a training checkpoint: set model.path to its teacher, which the plugs are for."
        )
    intervals, width = resolve_intervals(config), resolve_width(config)
    if intervals is None:
        raise UsageError(
            f"published.path={path} is a training checkpoint: give the intervals it was trained with, as "
            "intervals=qwen_image_paper."
        )
    if width is None:
        raise UsageError(
            "width=auto selects sets by measuring, but a training checkpoint has projectors for certain sets: give "
            "those, such as width=qwen_image_paper."
        )
    if config.published.residual is not None:
        raise UsageError(
            f"published.residual={config.published.residual} is for a model's folder, and published.path={path} is a "
            "training checkpoint: leave it out."
        )
    sets = width.get(STACK, {"text": [], "ffn": []})
    if sets["text"] and config.width.text_output != "last":
        raise UsageError(
            f"width.text_output={config.width.text_output} does not fit a training checkpoint, which has an output "
            "projector per group: use width.text_output=last."
        )
    pairs = intervals.get(STACK, [])
    return read_training(path, config.model.arch, pairs, sets["text"], sets["ffn"], config.published.ehs_same)
