"""HunyuanVideo: text to video, by a stack of dual-stream and one of single-stream blocks."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)

from tests.pipelines_tiny import first_parts as parts

CHANNELS, TEXT, POOLED = 4, 32, 24


def build(folder: Path) -> Path:
    """Saves the pipeline to `folder`, and returns it."""
    torch.manual_seed(0)
    text_encoder, tokenizer = parts.llama(TEXT)
    text_encoder_2, tokenizer_2 = parts.clip(POOLED, length=77)  # the pipeline pads to this length
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=4,
        num_single_layers=6,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=TEXT,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(4, 6, 6),
    )
    HunyuanVideoPipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    ).save_pretrained(folder)
    return folder
