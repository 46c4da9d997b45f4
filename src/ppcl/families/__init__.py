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
    `first_block` stay the teacher's. `categories` are those of the shapes world that a prompt can ask for.
    """

    stacks: dict[str, str]
    text_stacks: tuple[str, ...]
    pipeline_classes: tuple[str, ...]
    first_block: int = 0
    categories: tuple[str, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


FAMILIES = {
    "qwen_image": _Known({"transformer_blocks": "num_layers"}, ("transformer_blocks",), ("QwenImagePipeline",)),
    "flux": _Known(
        {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
        ("transformer_blocks",),
        ("FluxPipeline",),
    ),
    "dit": _Known(
        {"transformer_blocks": "num_layers"},
        (),
        ("DiTPipeline",),
        first_block=1,
        categories=("single_object", "colors"),
    ),
}
_CLASSES = {"qwen_image": "QwenImage", "flux": "Flux", "dit": "DiT"}


def family_of_pipeline(pipeline_class: str) -> str | None:
    """The family whose pipelines include `pipeline_class`, or None."""
    return next((name for name, known in FAMILIES.items() if pipeline_class in known.pipeline_classes), None)


def get_family(name: str, arch: Mapping[str, Any] | None = None, sampling: SamplingConfig | None = None) -> Family:
    """The family called `name`, for a transformer with the config `arch` that is sampled as `sampling` says."""
    return getattr(import_module(f"ppcl.families.{name}"), _CLASSES[name])(arch, sampling)
