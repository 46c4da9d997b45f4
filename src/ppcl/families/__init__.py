"""The known families. Importing this package loads no torch; `get_family` does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppcl.config import SamplingConfig
    from ppcl.families.base import Family


@dataclass(frozen=True)
class _Known:
    """What configuration checks need of a family before anything heavy is imported.

    `stacks` goes from the attribute of each block ModuleList, in order of execution, to the config key that
    counts it; `text_stacks` are those whose blocks have a text stream of their own to prune. Blocks before
    `first_block` stay the teacher's. `categories` are those of its `world`, a module of `ppcl.data`, that a
    prompt can ask for. A scene there is given `num_references` pictures, a user's prompt at most
    `max_references`. `controlnet_classes` are diffusers' model and pipeline; `takes_lora` is whether its
    pipelines load LoRAs.
    """

    stacks: dict[str, str]
    text_stacks: tuple[str, ...]
    pipeline_classes: tuple[str, ...]
    first_block: int = 0
    categories: tuple[str, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    world: str = "shapes"
    num_references: int = 0
    max_references: int = 0
    controlnet_classes: tuple[str, ...] = ()
    takes_lora: bool = True


FAMILIES = {
    "qwen_image": _Known(
        {"transformer_blocks": "num_layers"},
        ("transformer_blocks",),
        ("QwenImagePipeline",),
        controlnet_classes=("QwenImageControlNetModel", "QwenImageControlNetPipeline"),
    ),
    "qwen_image_edit": _Known(
        {"transformer_blocks": "num_layers"},
        ("transformer_blocks",),
        ("QwenImageEditPipeline",),
        categories=("recolor", "remove", "add", "move"),
        world="edits",
        num_references=1,
        max_references=1,
    ),
    "qwen_image_edit_2509": _Known(
        {"transformer_blocks": "num_layers"},
        ("transformer_blocks",),
        ("QwenImageEditPlusPipeline",),
        categories=("insert", "match_color"),
        world="edits",
        num_references=2,
        max_references=3,
    ),
    "flux": _Known(
        {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
        ("transformer_blocks",),
        ("FluxPipeline",),
        controlnet_classes=("FluxControlNetModel", "FluxControlNetPipeline"),
    ),
    "dit": _Known(
        {"transformer_blocks": "num_layers"},
        (),
        ("DiTPipeline",),
        first_block=1,
        categories=("single_object", "colors"),
        takes_lora=False,
    ),
}
_CLASSES = {
    "qwen_image": "qwen_image.QwenImage",
    "qwen_image_edit": "qwen_image_edit.QwenImageEdit",
    "qwen_image_edit_2509": "qwen_image_edit.QwenImageEditPlus",
    "flux": "flux.Flux",
    "dit": "dit.DiT",
}


def family_of_pipeline(pipeline_class: str) -> str | None:
    """The family whose pipelines include `pipeline_class`, or None."""
    return next((name for name, known in FAMILIES.items() if pipeline_class in known.pipeline_classes), None)


def get_family(name: str, arch: Mapping[str, Any] | None = None, sampling: SamplingConfig | None = None) -> Family:
    """The family called `name`, for a transformer with the config `arch` that is sampled as `sampling` says."""
    module, _, class_name = _CLASSES[name].partition(".")
    return getattr(import_module(f"ppcl.families.{module}"), class_name)(arch, sampling)
