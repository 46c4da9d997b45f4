"""The registry of families. Importing this loads no torch; `get_family` does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ppcl.families.facts import FamilyFacts

if TYPE_CHECKING:
    from ppcl.config import SamplingConfig
    from ppcl.families.base import Family

# Packages beside this file. Each has `FACTS`, one record per family.
_FOLDERS = ("qwen_image", "qwen_image_edit", "flux", "dit")

_SHARED_COMPONENTS = {
    "AutoencoderPixelUnshuffle": "ppcl.models.autoencoder_pixel_unshuffle",
    "PictureProcessor": "ppcl.models.processing_pictures",
}

# Makes the class of a traced model that is pruned in width from that of diffusers.
PRUNED_MAKER = "ppcl.families.traced.transformer_pruned"

FAMILIES: dict[str, FamilyFacts] = {
    facts.name: facts for folder in _FOLDERS for facts in import_module(f"ppcl.families.{folder}").FACTS
}


def register(facts: FamilyFacts) -> None:
    """Add a family that is defined outside of ppcl, or a traced model. It replaces a family of the same name."""
    FAMILIES[facts.name] = facts


def family_of_pipeline(pipeline_class: str) -> str | None:
    """Return the name of the family whose pipelines include `pipeline_class`, or None."""
    return next((name for name, known in FAMILIES.items() if pipeline_class in known.pipeline_classes), None)


def family_of_transformer(transformer_class: str) -> FamilyFacts | None:
    """Return the first family whose diffusers class or width-pruned class is `transformer_class`, or None."""
    found = (f for f in FAMILIES.values() if transformer_class in (f.transformer, *f.pruned_models))
    return next(found, None)


def get_family(
    name: str,
    arch: Mapping[str, Any] | None = None,
    sampling: SamplingConfig | None = None,
    categories: Sequence[str] | None = None,
) -> Family:
    """Return the family called `name`, for a transformer with the config `arch`; `KeyError` for an unknown name.

    `sampling` says how its pictures are drawn, `categories` what its prompts can ask for if not what the family's do.
    """
    facts = FAMILIES[name]
    if categories is not None:
        facts = replace(facts, categories=tuple(categories))
    module, _, class_name = facts.implementation.rpartition(".")
    return getattr(import_module(module), class_name)(facts, arch, sampling)


def builders() -> dict[str, str]:
    """Return the names of tiny pipelines (`model.builder`), each with the module whose `build_pipeline` makes it."""
    return {name: module for facts in FAMILIES.values() for name, module in facts.builders.items()}


def component_classes() -> dict[str, str]:
    """Return the class names of ppcl's own pipeline components, each with the module that defines it.

    An export copies that module's file beside the component's weights.
    """
    pruned = {name: module for facts in FAMILIES.values() for name, module in facts.pruned_models.items()}
    return _SHARED_COMPONENTS | pruned


def component_module(name: str) -> str | None:
    """Return the module that has the class of this name, or makes it; None if the name is of no component of ppcl."""
    return component_classes().get(name) or (PRUNED_MAKER if re.match("Pruned[A-Z]", name) else None)


def pruned_name(transformer_class: str) -> str:
    """Return the name of the class of a traced model that is pruned in width. A known family keeps its own name."""
    name = f"Pruned{transformer_class}"
    return name if component_module(name) == PRUNED_MAKER else f"PrunedTraced{transformer_class}"
