"""The embedded DiT: a real DiTPipeline. Its classes are single shapes, such as "a circle" and "a red circle"."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from ppcl.data.worlds import shapes
from ppcl.families.registry import FAMILIES, get_family
from ppcl.models.autoencoder_pixel_unshuffle import AutoencoderPixelUnshuffle

HIDDEN_SIZE = 64


def build_pipeline(seed: int, num_layers: int = 20) -> Any:
    """Return an untrained tiny DiT pipeline. The same `seed` and `num_layers` give the same weights."""
    torch.manual_seed(seed)
    transformer: Any = DiTTransformer2DModel(
        num_attention_heads=HIDDEN_SIZE // 32,
        attention_head_dim=32,
        in_channels=12,
        out_channels=24,
        num_layers=num_layers,
        sample_size=shapes.IMAGE_SIZE // 2,
        patch_size=2,
        num_embeds_ada_norm=1000,  # the number of classes; label 1000 is "no class"
    )
    names = shapes.all_captions(FAMILIES["dit"].categories)
    pipeline = DiTPipeline(
        transformer=transformer.eval(),
        vae=AutoencoderPixelUnshuffle(),
        # It predicts the picture. To predict the noise, 64 channels would have to carry all 48 numbers of a patch;
        # DiT-XL/2 has 1152 channels for 16 numbers.
        scheduler=DDIMScheduler(clip_sample=False, prediction_type="sample"),
        id2label={str(number): name for number, name in enumerate(names)},
    )
    get_family("dit").complete(pipeline)
    return pipeline
