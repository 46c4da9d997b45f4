"""ppcl: pluggable pruning with contiguous layer distillation for diffusion transformers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ppcl._diffusers import introduce
from ppcl.families.registry import component_classes

__version__ = "0.1.0"
introduce()

_FUNCTIONS = {
    "plug": "ppcl.surgery.plugboard",
    "place_residuals": "ppcl.surgery.controlnet",
    "remap_lora": "ppcl.surgery.remap",
    "import_published": "ppcl.families.qwen_image.published",
}


_BASES = {"ModelMixin": "diffusers", "ProcessorMixin": "transformers"}


def __getattr__(name: str) -> Any:
    # diffusers resolves a pipeline component ["ppcl", "AutoencoderPixelUnshuffle"] on this package and
    # looks for the base classes that say how to load it in the same place. Lazy: `import ppcl` is free.
    module = component_classes().get(name) or _FUNCTIONS.get(name) or _BASES.get(name)
    if module is not None:
        return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
