"""Wan: text to video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from tests.pipelines_tiny import first_parts as parts

CHANNELS, TEXT = 8, 48
BOUNDARY = 0.8  # share of the timesteps from which on the first of two denoisers draws
SETTINGS = ["model.sampling.height=32", "model.sampling.width=48", "model.sampling.arguments={num_frames: 9}"]


def build(folder: Path) -> Path:
    """Saves the pipeline to `folder`, and returns it."""
    return build_as(WanPipeline, CHANNELS, folder)


def build_22(folder: Path, boundary: float | None = BOUNDARY) -> Path:
    """Saves a pipeline of two denoisers, as Wan 2.2 has them, to `folder`, and returns it."""
    torch.manual_seed(1)
    return build_as(WanPipeline, CHANNELS, folder, transformer_2=_transformer(CHANNELS), boundary_ratio=boundary)


def build_as(kind: type, in_channels: int, folder: Path, **others: Any) -> Path:
    """Saves a pipeline of the class `kind`, whose transformer has this many input channels.

    `others`: further components and settings of it.
    """
    torch.manual_seed(0)
    text_encoder, tokenizer = parts.umt5(TEXT)
    kind(
        transformer=_transformer(in_channels),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.wan_vae(CHANNELS),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        **others,
    ).save_pretrained(folder)
    return folder


def _transformer(in_channels: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
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
