"""A tiny Krea 2: one stack over text and picture, whose text comes from several layers of a Qwen3-VL."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKLQwenImage, Krea2Pipeline, Krea2Transformer2DModel

from tests.pipelines_tiny.language_models import WIDTH, chat_tokenizer, qwen3_vl
from tests.pipelines_tiny.saving import flow_scheduler, saved, seed

SETTINGS = ["model.sampling.max_sequence_length=24"]


def build(folder: Path) -> Path:
    """Save the pipeline to `folder`, and return it."""
    seed()
    tokenizer = chat_tokenizer()
    return saved(
        folder,
        Krea2Pipeline,
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        ),
        text_encoder=qwen3_vl(tokenizer).model,
        tokenizer=tokenizer,
        transformer=Krea2Transformer2DModel(
            in_channels=16,
            num_layers=6,
            attention_head_dim=16,
            num_attention_heads=6,
            num_key_value_heads=3,
            intermediate_size=160,
            timestep_embed_dim=32,
            text_hidden_dim=WIDTH,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=64,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        ),
        text_encoder_select_layers=(1, 2),
    )
