"""ppcl: pluggable pruning with contiguous layer distillation for diffusion transformers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ppcl._diffusers import introduce
from ppcl.families.registry import component_module

__version__ = "0.1.0"
introduce()

# The public names, each with the module that has it.
_PUBLIC = {
    "run": "ppcl.api",
    "explain": "ppcl.api",
    "load": "ppcl.api",
    "teacher": "ppcl.api",
    "sampling": "ppcl.api",
    "Results": "ppcl.api",
    "compare": "ppcl.report.compare",
    "UsageError": "ppcl.errors",
    "trace": "ppcl.families.traced.trace",
    "Trace": "ppcl.families.traced.trace",
    "plug": "ppcl.surgery.plugboard",
    "place_residuals": "ppcl.surgery.controlnet",
    "remap_lora": "ppcl.surgery.remap",
    "import_published": "ppcl.families.qwen_image.published",
}

# diffusers and transformers resolve a pipeline's component ["ppcl", "AutoencoderPixelUnshuffle"] on this package, and
# look here, too, for the base classes that say how to load it.
_BASES = {"ModelMixin": "diffusers", "ProcessorMixin": "transformers"}


def __getattr__(name: str) -> Any:
    """Import what is asked for: `import ppcl` itself loads no library."""
    module = _PUBLIC.get(name) or component_module(name) or _BASES.get(name)
    if module is not None:
        return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
