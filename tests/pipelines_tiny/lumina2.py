"""A tiny Lumina 2: refiners, then one stack over text and picture, which the transformer joins and pads itself."""

from __future__ import annotations

from pathlib import Path

from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

from tests.pipelines_tiny.first_parts import picture_vae
from tests.pipelines_tiny.language_models import WIDTH, chat_tokenizer, gemma2
from tests.pipelines_tiny.saving import flow_scheduler, saved, seed

SETTINGS = ["model.sampling.max_sequence_length=32", 'model.sampling.arguments.system_prompt=""']


def build(folder: Path) -> Path:
    """Save the pipeline to `folder`, and return it."""
    seed()
    tokenizer = chat_tokenizer()
    return saved(
        folder,
        Lumina2Pipeline,
        scheduler=flow_scheduler(),
        vae=picture_vae(6),
        text_encoder=gemma2(tokenizer),
        tokenizer=tokenizer,
        transformer=Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=6,
            hidden_size=96,
            num_layers=6,
            num_refiner_layers=2,
            num_attention_heads=8,
            num_kv_heads=4,
            multiple_of=16,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(60, 20, 20),
            cap_feat_dim=WIDTH,
        ),
    )
