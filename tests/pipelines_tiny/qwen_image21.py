"""A tiny Qwen-Image 2.1: one stack over text and picture, with a cache of keys from step to step."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel

from tests.pipelines_tiny.language_models import WIDTH, qwen3_vl, qwen3_vl_processor
from tests.pipelines_tiny.saving import flow_scheduler, saved, seed

SETTINGS: list[str] = []


def build(folder: Path) -> Path:
    """Save the pipeline to `folder`, and return it."""
    seed()
    processor = qwen3_vl_processor()
    return saved(
        folder,
        QwenImage21Pipeline,
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage21(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=16,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * 16,
            latents_std=[1.0] * 16,
        ),
        text_encoder=qwen3_vl(processor.tokenizer),
        processor=processor,
        transformer=QwenImage21Transformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=6,
            attention_head_dim=16,
            num_attention_heads=4,
            context_in_dim=WIDTH,
            mlp_ratio=3,
            axes_dims_rope=(4, 6, 6),
        ),
    )
