"""A tiny Z-Image: its transformer takes lists of pictures and of texts, and pads both itself."""

from __future__ import annotations

from pathlib import Path

from diffusers import ZImagePipeline, ZImageTransformer2DModel

from tests.pipelines_tiny.first_parts import picture_vae
from tests.pipelines_tiny.language_models import WIDTH, chat_tokenizer, qwen3
from tests.pipelines_tiny.saving import flow_scheduler, saved, seed

SETTINGS = ["model.sampling.max_sequence_length=24"]


def build(folder: Path) -> Path:
    """Save the pipeline to `folder`, and return it."""
    seed()
    tokenizer = chat_tokenizer()
    return saved(
        folder,
        ZImagePipeline,
        scheduler=flow_scheduler(),
        vae=picture_vae(6),
        text_encoder=qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=6,
            dim=64,
            n_layers=6,
            n_refiner_layers=2,
            n_heads=4,
            n_kv_heads=4,
            cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[128, 48, 48],
        ),
    )
