"""A tiny Sana: linear attention, a Gemma 2, and latents of a 32nd of the pictures' size."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

from tests.pipelines_tiny.language_models import WIDTH, chat_tokenizer, gemma2
from tests.pipelines_tiny.saving import saved, seed

SETTINGS = [
    "model.sampling.max_sequence_length=16",
    "model.sampling.arguments.complex_human_instruction=[]",
    "model.sampling.arguments.use_resolution_binning=false",
]


def build(folder: Path) -> Path:
    """Save the pipeline to `folder`, and return it."""
    seed()
    tokenizer = chat_tokenizer()
    halvings = 3
    return saved(
        folder,
        SanaPipeline,
        tokenizer=tokenizer,
        text_encoder=gemma2(tokenizer),
        vae=AutoencoderDC(
            latent_channels=6,
            attention_head_dim=4,
            encoder_block_out_channels=(8,) * (halvings + 1),
            decoder_block_out_channels=(8,) * (halvings + 1),
            encoder_layers_per_block=(1,) * (halvings + 1),
            decoder_layers_per_block=(1,) * (halvings + 1),
            encoder_qkv_multiscales=((),) * (halvings + 1),
            decoder_qkv_multiscales=((),) * (halvings + 1),
            encoder_out_shortcut=False,
            decoder_in_shortcut=False,
        ),
        transformer=SanaTransformer2DModel(
            in_channels=6,
            out_channels=6,
            num_attention_heads=4,
            attention_head_dim=12,
            num_layers=6,
            num_cross_attention_heads=3,
            cross_attention_head_dim=16,
            cross_attention_dim=48,
            caption_channels=WIDTH,
            sample_size=32,
        ),
        scheduler=DPMSolverMultistepScheduler(
            flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2
        ),
    )
