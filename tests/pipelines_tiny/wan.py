"""Wan: text to video."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from tests.pipelines_tiny import first_parts as parts

CHANNELS, TEXT = 8, 48
SETTINGS = ["model.sampling.height=32", "model.sampling.width=48", "model.sampling.arguments={num_frames: 9}"]


def build(folder: Path) -> Path:
    """Saves the pipeline to `folder`, and returns it."""
    return build_as(WanPipeline, CHANNELS, folder)


def build_as(kind: type, in_channels: int, folder: Path) -> Path:
    """Saves a pipeline of the class `kind`, whose transformer has this many input channels."""
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
    kind(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.wan_vae(CHANNELS),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return folder
