"""The tiny Qwen-Image-Edit-2509, built from the parts of `tiny_qwen_image_edit`. No trained one is shipped."""

from __future__ import annotations

from typing import Any

from diffusers import QwenImageEditPlusPipeline

from ppcl.families.qwen_image_edit import tiny as tiny_qwen_image_edit


def build_pipeline(seed: int, num_layers: int = 20, **arch: Any) -> Any:
    """Return an untrained tiny pipeline; `zero_cond_t=True` makes it a 2511. Equal arguments give equal weights."""
    return tiny_qwen_image_edit.build_pipeline(seed, num_layers, QwenImageEditPlusPipeline, **arch)
