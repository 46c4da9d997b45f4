"""LTX-2: text to video with sound, whose blocks pass on a stream of each."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

from tests.pipelines_tiny import first_parts as parts

CHANNELS, AUDIO_CHANNELS, MEL_BINS, TEXT = 8, 4, 16, 32


def build(folder: Path) -> Path:
    """Saves the pipeline to `folder`, and returns it."""
    torch.manual_seed(0)
    text_encoder, tokenizer = parts.gemma3(TEXT)
    connectors = LTX2TextConnectors(
        caption_channels=TEXT,
        text_proj_in_factor=text_encoder.config.text_config.num_hidden_layers + 1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=TEXT // 2,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=8,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=TEXT // 2,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=8,
        connector_rope_base_seq_len=32,
    )
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=AUDIO_CHANNELS * MEL_BINS // 4,  # of packed latents, whose statistics have this length
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        resolution=32,
        latent_channels=AUDIO_CHANNELS,
        mel_bins=MEL_BINS,
    )
    transformer = LTX2VideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        audio_in_channels=AUDIO_CHANNELS * MEL_BINS // audio_vae.mel_compression_ratio,
        audio_out_channels=AUDIO_CHANNELS * MEL_BINS // audio_vae.mel_compression_ratio,
        audio_num_attention_heads=2,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=32,
        num_layers=6,
        caption_channels=TEXT,
    )
    LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKLLTX2Video(
            latent_channels=CHANNELS,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            decoder_spatial_padding_mode="zeros",
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        ),
        audio_vae=audio_vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        connectors=connectors,
        transformer=transformer,
        vocoder=LTX2Vocoder(
            in_channels=audio_vae.config.output_channels * MEL_BINS,
            hidden_channels=32,
            upsample_kernel_sizes=[16, 10, 4],
            upsample_factors=[6, 5, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3]],
            output_sampling_rate=6000,
        ),
    ).save_pretrained(folder)
    return folder
