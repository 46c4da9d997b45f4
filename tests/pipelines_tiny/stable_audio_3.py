"""Stable Audio 3: text to stereo sound, by one stack of blocks over memory tokens and the sound's own."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderSAME,
    FlowMatchEulerDiscreteScheduler,
    StableAudio3DiTModel,
    StableAudio3Pipeline,
)
from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder

from tests.pipelines_tiny import first_parts as parts

CHANNELS, TEXT = 8, 32


def build(folder: Path) -> Path:
    """Saves the pipeline to `folder`, and returns it. A second of its sound has 4,000 samples, and 63 tokens."""
    torch.manual_seed(0)
    text_encoder, tokenizer = parts.t5_gemma(TEXT)
    transformer = StableAudio3DiTModel(
        io_channels=CHANNELS,
        embed_dim=64,
        depth=6,
        num_heads=4,
        cond_token_dim=TEXT,
        global_cond_dim=TEXT,
        local_add_cond_dim=9,
        timestep_features_dim=32,
        num_memory_tokens=4,
    )
    StableAudio3Pipeline(
        vae=AutoencoderSAME(
            patch_size=16,
            encoder_channels=16,
            encoder_c_mults=(2,),
            encoder_strides=(4,),
            encoder_transformer_depths=(1,),
            latent_dim=CHANNELS,
            dim_heads=16,
            sampling_rate=4000,
        ),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        duration_embedder=StableAudio3DurationEmbedder(output_dim=TEXT, fourier_dim=16),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ).save_pretrained(folder)
    return folder
