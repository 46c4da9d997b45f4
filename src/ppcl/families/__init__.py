"""The known families. Importing this package loads no torch; `get_family` does."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ppcl.families.base import Family


class _Known:
    """What configuration checks need of a family before anything heavy is imported."""

    def __init__(self, stacks: dict[str, str], pipeline_classes: tuple[str, ...]) -> None:
        self.stacks = stacks
        self.pipeline_classes = pipeline_classes


FAMILIES = {"qwen_image": _Known({"transformer_blocks": "num_layers"}, ("QwenImagePipeline",))}


def family_of_pipeline(pipeline_class: str) -> str | None:
    """The family whose pipelines include `pipeline_class`, or None."""
    return next((name for name, known in FAMILIES.items() if pipeline_class in known.pipeline_classes), None)


def get_family(name: str) -> Family:
    """The family called `name`."""
    from ppcl.families.qwen_image import QwenImage

    return {"qwen_image": QwenImage}[name]()
