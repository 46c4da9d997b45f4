"""The tiny Qwen-Image-Edit-2509, of the embedded Edit's parts: it is given two pictures. Not trained."""

from __future__ import annotations

from typing import Any

from diffusers import QwenImageEditPlusPipeline

from ppcl.families.qwen_image_edit import tiny as tiny_qwen_image_edit


def build_pipeline(seed: int, num_layers: int = 20, **arch: Any) -> Any:
    """An untrained tiny pipeline, a pure function of its arguments; `zero_cond_t=True` makes it a 2511."""
    return tiny_qwen_image_edit.build_pipeline(seed, num_layers, QwenImageEditPlusPipeline, **arch)
