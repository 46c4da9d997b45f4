"""ppcl: pluggable pruning with contiguous layer distillation for diffusion transformers."""

from __future__ import annotations

from typing import Any

from ppcl._diffusers import introduce

__version__ = "0.1.0"
introduce()


def __getattr__(name: str) -> Any:
    # diffusers resolves a pipeline component ["ppcl", "AutoencoderPixelUnshuffle"] on this package and
    # looks for the base class that says how to load it in the same place. Lazy: `import ppcl` is free.
    if name == "AutoencoderPixelUnshuffle":
        from ppcl.models.autoencoder_pixel_unshuffle import AutoencoderPixelUnshuffle

        return AutoencoderPixelUnshuffle
    if name == "PrunedQwenImageTransformer2DModel":
        from ppcl.models.transformer_qwen_image_pruned import PrunedQwenImageTransformer2DModel

        return PrunedQwenImageTransformer2DModel
    if name == "plug":
        from ppcl.surgery.plugboard import plug

        return plug
    if name == "ModelMixin":
        from diffusers import ModelMixin

        return ModelMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
