"""ppcl: pluggable pruning with contiguous layer distillation for diffusion transformers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ppcl._diffusers import introduce

__version__ = "0.1.0"
introduce()

_MODELS = {
    "AutoencoderPixelUnshuffle": "autoencoder_pixel_unshuffle",
    "PictureProcessor": "processing_pictures",
    "PrunedDiTTransformer2DModel": "transformer_dit_pruned",
    "PrunedFluxTransformer2DModel": "transformer_flux_pruned",
    "PrunedQwenImageTransformer2DModel": "transformer_qwen_image_pruned",
}
_FUNCTIONS = {
    "plug": "plugboard",
    "place_residuals": "controlnet",
    "remap_lora": "remap",
    "import_published": "published",
}


_BASES = {"ModelMixin": "diffusers", "ProcessorMixin": "transformers"}


def __getattr__(name: str) -> Any:
    # diffusers resolves a pipeline component ["ppcl", "AutoencoderPixelUnshuffle"] on this package and
    # looks for the base classes that say how to load it in the same place. Lazy: `import ppcl` is free.
    if name in _MODELS:
        return getattr(import_module(f"ppcl.models.{_MODELS[name]}"), name)
    if name in _FUNCTIONS:
        return getattr(import_module(f"ppcl.surgery.{_FUNCTIONS[name]}"), name)
    if name in _BASES:
        return getattr(import_module(_BASES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
