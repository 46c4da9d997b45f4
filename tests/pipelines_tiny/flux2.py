"""A tiny FLUX.2: dual-stream and single-stream blocks, whose text comes from three layers of a Mistral 3."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKLFlux2, Flux2Pipeline, Flux2Transformer2DModel
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from tests.pipelines_tiny.language_models import WIDTH, chat_tokenizer
from tests.pipelines_tiny.saving import flow_scheduler, saved, seed

SETTINGS = ["model.sampling.arguments.text_encoder_out_layers=[1,2,3]", "model.sampling.max_sequence_length=24"]


def build(folder: Path) -> Path:
    """Save the pipeline to `folder`, and return it."""
    seed()
    tokenizer = chat_tokenizer()
    text = {
        "model_type": "mistral",
        "vocab_size": -(-len(tokenizer) // 8) * 8,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "image_size": 28,
        "patch_size": 14,
    }
    return saved(
        folder,
        Flux2Pipeline,
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4
        ),
        text_encoder=Mistral3ForConditionalGeneration(
            Mistral3Config(text_config=text, vision_config=vision, image_token_index=3)
        ),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=6,
            num_single_layers=7,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=3 * WIDTH,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
        ),
    )
