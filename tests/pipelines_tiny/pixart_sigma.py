"""A tiny PixArt-Sigma: cross-attention to a T5, and a prediction of noise and variance for a scheduler of diffusion."""

from __future__ import annotations

from pathlib import Path

from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

from tests.pipelines_tiny.first_parts import picture_vae, t5
from tests.pipelines_tiny.language_models import WIDTH
from tests.pipelines_tiny.saving import saved, seed

SETTINGS = [
    "model.sampling.max_sequence_length=16",
    "model.sampling.arguments.clean_caption=false",
    "model.sampling.arguments.use_resolution_binning=false",
]


def build(folder: Path) -> Path:
    """Save the pipeline to `folder`, and return it."""
    seed()
    text_encoder, tokenizer = t5(WIDTH)
    return saved(
        folder,
        PixArtSigmaPipeline,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=picture_vae(4),
        transformer=PixArtTransformer2DModel(
            num_attention_heads=3,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=6,
            cross_attention_dim=48,
            sample_size=8,
            patch_size=2,
            caption_channels=WIDTH,
        ),
        scheduler=DPMSolverMultistepScheduler(),
    )
