"""The embedded Qwen-Image-Edit: the real pipeline on pictures of 32x32 cells of 32x32 pixels each.

So a picture has the megapixel that the pipeline resizes all pictures to. As in `tiny_qwen_image`, only the transformer
is trained. The vision tower gives zeros for every picture: the transformer learns the content of a picture from its
latents alone.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPipeline
from torch import nn
from transformers import Qwen2VLImageProcessorPil

from ppcl.data.worlds import edits
from ppcl.families.qwen_image.tiny import (
    SPECIAL_TOKENS,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
)
from ppcl.models.processing_pictures import PictureProcessor

CELL = 32  # pixels; a picture of a megapixel has 32 cells a side
# The template that the pipelines wrap around an instruction. They drop the first 64 tokens of the result, so every word
# and every group of punctuation marks in the template must be one token.
_TEMPLATE = """system
Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how the
user's text instruction should alter or modify the image. Generate a new image that meets the user's requirements while
maintaining consistency with the original input where appropriate. user assistant Picture 1: 2: """
_VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>")


def build_pipeline(seed: int, num_layers: int = 20, pipeline_class: Any = QwenImageEditPipeline, **arch: Any) -> Any:
    """Return an untrained tiny Qwen-Image-Edit pipeline. The same arguments give the same weights.

    `arch` are further config entries of the transformer.
    """
    torch.manual_seed(seed)
    words = {*re.findall(r"'s|\w+|[^\w\s]+", _TEMPLATE), *edits.vocabulary()}
    tokenizer = build_tokenizer(words, [*SPECIAL_TOKENS, *_VISION_TOKENS])
    text_encoder: Any = build_text_encoder(tokenizer, _VISION_TOKENS)
    for parameter in text_encoder.model.visual.merger.mlp[-1].parameters():
        nn.init.zeros_(parameter)
    side = 28  # two patches of 14 merge into one token
    pictures = Qwen2VLImageProcessorPil(min_pixels=side**2, max_pixels=side**2)
    return pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
        vae=build_vae(CELL),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        processor=PictureProcessor(pictures, tokenizer),
        transformer=build_transformer(num_layers, **arch),
    )
