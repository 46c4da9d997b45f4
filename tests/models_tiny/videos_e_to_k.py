"""Tiny models of diffusers' transformer classes that make videos, from EasyAnimate to Kandinsky."""

from __future__ import annotations

from typing import Any

import torch

from tests.models_tiny.case import Case
from tests.models_tiny.draws import both, normals, padding


def _easy_animate() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 4, 3, 8, 12),
        "timestep": both(700.0).contiguous(),
        "encoder_hidden_states": noise(2, 9, 20),
        "return_dict": False,
    }


def _helios() -> dict[str, Any]:
    """3 frames, after a first frame and 16 + 2 + 1 frames of history, the older the coarser."""
    noise = normals()
    first, long, middle, last, new = torch.arange(23).split([1, 16, 2, 1, 3])
    return {
        "hidden_states": noise(2, 4, 3, 8, 12),
        "timestep": both(700.0),
        "encoder_hidden_states": noise(2, 9, 20),
        "indices_hidden_states": new[None],
        "indices_latents_history_short": torch.cat([first, last])[None],
        "indices_latents_history_mid": middle[None],
        "indices_latents_history_long": long[None],
        "latents_history_short": noise(2, 4, 2, 8, 12),
        "latents_history_mid": noise(2, 4, 2, 8, 12),
        "latents_history_long": noise(2, 4, 16, 8, 12),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _hunyuan_video() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 4, 3, 8, 12),
        "timestep": both(700.0),
        "encoder_hidden_states": noise(2, 9, 20),
        "encoder_attention_mask": padding(9, 6).float(),
        "pooled_projections": noise(2, 28),
        "guidance": both(6000.0),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _framepack() -> dict[str, Any]:
    """3 new frames between a given first frame and 1 + 2 + 16 later frames, the later the coarser."""
    noise = normals()
    first, _, new, near, middle, far = torch.arange(26).split([1, 3, 3, 1, 2, 16])
    return _hunyuan_video() | {
        "image_embeds": noise(2, 11, 34),
        "indices_latents": new,
        "latents_clean": noise(2, 4, 2, 8, 12),
        "indices_latents_clean": torch.cat([first, near]),
        "latents_history_2x": noise(2, 4, 2, 8, 12),
        "indices_latents_history_2x": middle,
        "latents_history_4x": noise(2, 4, 16, 8, 12),
        "indices_latents_history_4x": far,
    }


def _hunyuan_video15() -> dict[str, Any]:
    """A video from text alone: the given picture, its mask and its embedding are zero."""
    noise = normals()
    return {
        "hidden_states": torch.cat([noise(2, 4, 3, 4, 6), torch.zeros(2, 5, 3, 4, 6)], dim=1),
        "image_embeds": torch.zeros(2, 13, 34),
        "timestep": both(700.0),
        "attention_kwargs": {},
        "return_dict": False,
        "encoder_hidden_states": noise(2, 9, 20),
        "encoder_attention_mask": padding(9, 6).float(),
        "encoder_hidden_states_2": noise(2, 11, 26),
        "encoder_attention_mask_2": padding(11, 0).float(),  # the second prompt asks for no written text
    }


def _kandinsky5() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": torch.cat([noise(2, 3, 8, 12, 4), torch.zeros(2, 3, 8, 12, 5)], dim=-1),
        "encoder_hidden_states": noise(2, 9, 20),
        "pooled_projections": noise(2, 26),
        "timestep": both(700.0),
        "visual_rope_pos": [torch.arange(3), torch.arange(4), torch.arange(6)],
        "text_rope_pos": torch.arange(9),
        "scale_factor": (1.0, 2.0, 2.0),
        "sparse_params": None,
        "return_dict": True,  # unlike the other pipelines
    }


def _kandinsky6() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": torch.cat([noise(2, 3, 8, 12, 4), torch.zeros(2, 3, 8, 12, 5)], dim=-1),
        "audio_hidden_states": noise(2, 14, 10),
        "encoder_hidden_states": noise(2, 9, 20),
        "pooled_projections": noise(2, 26),
        "timestep": both(700.0),
        "visual_rope_pos": None,
        "encoder_attention_mask": padding(9, 6).bool(),
        "visual_token_type_ids": None,
        "return_dict": False,
    }


def _kandinsky6_sr() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": torch.cat([noise(2, 3, 8, 8, 4), torch.zeros(2, 3, 8, 8, 5)], dim=-1),
        "timestep": both(700.0),
        "return_dict": False,
    }


VIDEOS: dict[str, Case | str] = {
    "EasyAnimateTransformer3DModel": Case(
        {
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_width": 12,
            "sample_height": 8,
            "num_layers": 5,
            "mmdit_layers": 11,  # as published, at least the depth: text and picture have weights of their own in all
            "time_embed_dim": 28,
            "add_norm_text_encoder": True,
            "text_embed_dim": 20,
        },
        _easy_animate,
    ),
    "HeliosTransformer3DModel": Case(
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 20,
            "freq_dim": 32,
            "ffn_dim": 80,
            "num_layers": 5,
            "rope_dim": (4, 6, 6),
        },
        _helios,
    ),
    "HunyuanVideoTransformer3DModel": Case(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "num_layers": 5,
            "num_single_layers": 7,
            "num_refiner_layers": 4,
            "patch_size": 2,
            "patch_size_t": 1,
            "text_embed_dim": 20,
            "pooled_projection_dim": 28,
            "rope_axes_dim": (4, 6, 6),
        },
        _hunyuan_video,
    ),
    "HunyuanVideoFramepackTransformer3DModel": Case(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "num_layers": 5,
            "num_single_layers": 7,
            "num_refiner_layers": 4,
            "patch_size": 2,
            "patch_size_t": 1,
            "text_embed_dim": 20,
            "pooled_projection_dim": 28,
            "rope_axes_dim": (4, 6, 6),
            "has_image_proj": True,
            "image_proj_dim": 34,
            "has_clean_x_embedder": True,
        },
        _framepack,
    ),
    "HunyuanVideo15Transformer3DModel": Case(
        {
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "num_layers": 5,
            "num_refiner_layers": 4,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 20,
            "text_embed_2_dim": 26,
            "image_embed_dim": 34,
            "rope_axes_dim": (4, 6, 6),
            "target_size": 64,
            "task_type": "t2v",
        },
        _hunyuan_video15,
    ),
    # The modulation of its blocks starts at zero: a new model's blocks return the streams as they came.
    "Kandinsky5Transformer3DModel": Case(
        {
            "in_visual_dim": 4,
            "in_text_dim": 20,
            "in_text_dim2": 26,
            "time_dim": 28,
            "out_visual_dim": 4,
            "patch_size": (1, 2, 2),
            "model_dim": 48,
            "ff_dim": 80,
            "num_text_blocks": 4,
            "num_visual_blocks": 5,
            "axes_dims": (4, 6, 6),
            "visual_cond": True,
        },
        _kandinsky5,
    ),
    "Kandinsky6Transformer3DModel": Case(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 20,
            "in_text_dim2": 26,
            "time_dim": 28,
            "patch_size": (1, 2, 2),
            "model_dim": 48,
            "ff_dim": 80,
            "num_text_blocks": 4,
            "num_visual_blocks": 5,
            "axes_dims": (4, 6, 6),
            "in_audio_dim": 10,
            "out_audio_dim": 10,
            "model_dim_a": 32,
            "time_dim_a": 36,
            "ff_dim_a": 72,
            "axes_dims_a": (4, 6, 6),
            "text_token_padding": True,
            "ca_rope": True,
            "cross_gates": True,
            "fix_modulation": True,
        },
        _kandinsky6,
    ),
    "Kandinsky6SRTransformer3DModel": Case(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 20,
            "time_dim": 28,
            "patch_size": (1, 1, 1),
            "model_dim": 48,
            "ff_dim": 80,
            "num_visual_blocks": 5,
            "axes_dims": (4, 6, 6),
            "nabla_window": (3, 1, 1),
            "tile_sizes": ((64, 64), (64, 96)),
        },
        _kandinsky6_sr,
    ),
}
