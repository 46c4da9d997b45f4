"""Stable Diffusion 3: two CLIP text encoders and T5, and one stack of dual-stream blocks."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from tests.pipelines_tiny import first_parts as parts


def build(folder: Path) -> Path:
    """Saves the pipeline to `folder`, and returns it."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=6,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=48,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    text_encoder, tokenizer = parts.clip(24, projected=24)
    text_encoder_2, tokenizer_2 = parts.clip(24, projected=24)
    text_encoder_3, tokenizer_3 = parts.t5(64)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.picture_vae(8),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    ).save_pretrained(folder)
    return folder
