"""Wan: text to video, and image to video, which is given the first frame."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel

from tests.pipelines_tiny import first_parts as parts

CHANNELS, TEXT = 8, 48


def build(folder: Path) -> Path:
    """Saves the pipeline that is given texts to `folder`, and returns it."""
    return _build(folder, WanPipeline, CHANNELS)


def build_from_image(folder: Path) -> Path:
    """Saves the pipeline that is given a first frame to `folder`, and returns it."""
    mask = 4  # channels that say which frames are given
    return _build(folder, WanImageToVideoPipeline, 2 * CHANNELS + mask)


def _build(folder: Path, pipeline: type, in_channels: int) -> Path:
    torch.manual_seed(0)
    text_encoder, tokenizer = parts.umt5(TEXT)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=CHANNELS,
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=128,
        num_layers=6,
        rope_max_seq_len=32,
    )
    pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.wan_vae(CHANNELS),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return folder
