"""Tiny models of diffusers' transformer classes that make videos or music, from AceStep to Cosmos."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from torch import Tensor

from tests.models_tiny.case import Case
from tests.models_tiny.draws import both, normals, padding


def _ace_step() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 22, 8),
        "timestep": both(0.7),
        "timestep_r": both(0.7),
        "encoder_hidden_states": noise(2, 9, 40),
        "context_latents": torch.cat([noise(2, 22, 8), torch.ones(2, 22, 8)], dim=-1),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _allegro_rotary(frames: int, height: int, width: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the rotary embedding of a grid of patches, as Allegro's pipeline prepares it."""
    *freqs, t, h, w = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (height, width)), (height, width), frames)
    positions = torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1).contiguous()
    return tuple(freqs), tuple(positions)


def _allegro() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 4, 3, 8, 12),
        "encoder_hidden_states": noise(2, 9, 20),
        "encoder_attention_mask": padding(9, 6),
        "timestep": torch.tensor(700).expand(2),
        "image_rotary_emb": _allegro_rotary(3, 4, 6),
        "return_dict": False,
    }


def _any_flow() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 3, 4, 8, 12),
        "timestep": torch.full((2, 3), 700.0),
        "r_timestep": torch.full((2, 3), 400.0),
        "encoder_hidden_states": noise(2, 9, 20),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _any_flow_far() -> dict[str, Any]:
    """The second chunk of a video: its blocks read what the first chunk left in their caches."""
    noise = normals()
    tokens, far_tokens, heads, head_dim = 24, 6, 2, 24  # tokens of a frame, and of a frame that is long past
    kv_cache = {
        block: {
            "full_cache": noise(2, 2, heads, 3 * 3 * tokens, head_dim),
            "compressed_cache": noise(2, 2, heads, 3 * far_tokens, head_dim),
        }
        for block in range(5)
    }
    return _any_flow() | {
        "chunk_partition": [1, 3],
        "kv_cache": kv_cache,
        "kv_cache_flag": {"num_cached_chunks": 1, "is_cache_step": False},
    }


def _chrono_edit() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 12, 3, 8, 12),
        "timestep": torch.tensor(700).expand(2),
        "encoder_hidden_states": noise(2, 512, 20),  # the attention counts on 512 tokens of text
        "encoder_hidden_states_image": noise(2, 11, 28),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _cogvideo_rotary(frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    return get_3d_rotary_pos_embed(16, ((0, 0), (height, width)), (height, width), frames)


def _cogvideox() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 3, 4, 8, 12),
        "encoder_hidden_states": noise(2, 9, 20),
        "timestep": torch.tensor(700).expand(2),
        "image_rotary_emb": _cogvideo_rotary(3, 4, 6),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _consis_id() -> dict[str, Any]:
    noise = normals()
    return _cogvideox() | {
        "hidden_states": noise(2, 3, 8, 8, 12),
        "id_vit_hidden": [noise(1, 11, 24) for _ in range(2)],
        "id_cond": noise(1, 44),
    }


def _cosmos() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 6, 3, 8, 12),
        "timestep": both(0.7),
        "encoder_hidden_states": noise(2, 9, 20),
        "fps": 30,
        "condition_mask": torch.tensor([1.0, 0, 0]).view(1, 1, 3, 1, 1).expand(2, 1, 3, 8, 12),
        "padding_mask": torch.zeros(1, 1, 64, 96),
        "return_dict": False,
    }


def _cosmos3() -> dict[str, Any]:
    """One sample, packed into one sequence: 7 tokens of text, then 3 frames of 2 x 3 patches."""
    noise = normals()
    text, frames, height, width = 7, 3, 2, 3
    video = frames * height * width
    words = torch.arange(float(text)).expand(3, text)
    patches = torch.cartesian_prod(*(torch.arange(float(n)) for n in (frames, height, width))).T
    patches = patches + torch.tensor([[text + 100.0], [0], [0]])
    parts = ("tokens", "token_shapes", "sequence_indexes", "mse_loss_indexes", "timesteps", "noisy_frame_indexes")
    return {
        "input_ids": torch.arange(20, 20 + text),
        "text_indexes": torch.arange(text),
        "position_ids": torch.cat([words, patches], dim=1),
        "und_len": text,
        "sequence_length": text + video,
        "vision_tokens": [noise(1, 4, frames, 2 * height, 2 * width)],
        "vision_token_shapes": [(frames, height, width)],
        "vision_sequence_indexes": torch.arange(text, text + video),
        "vision_mse_loss_indexes": torch.arange(text, text + video),
        "vision_timesteps": torch.full((video,), 700.0),
        "vision_noisy_frame_indexes": [torch.arange(frames)],
        "return_dict": False,
        **{f"{kind}_{part}": None for kind in ("sound", "action") for part in parts},
        "action_domain_ids": None,
    }


VIDEOS: dict[str, Case | str] = {
    "AceStepTransformer1DModel": Case(
        {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "patch_size": 2,
            "sliding_window": 3,
            "encoder_hidden_size": 40,
        },
        _ace_step,
    ),
    "AllegroTransformer3DModel": Case(
        {
            "patch_size": 2,
            "patch_size_t": 1,
            "num_attention_heads": 3,
            "attention_head_dim": 24,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 5,
            "cross_attention_dim": 72,
            "sample_height": 8,
            "sample_width": 12,
            "sample_frames": 10,
            "caption_channels": 20,
            "interpolation_scale_t": 1.0,
            "interpolation_scale_h": 1.0,
            "interpolation_scale_w": 1.0,
        },
        _allegro,
    ),
    "AnyFlowTransformer3DModel": Case(
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 3,
            "attention_head_dim": 24,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 20,
            "freq_dim": 32,
            "ffn_dim": 80,
            "num_layers": 5,
            "rope_max_seq_len": 64,
        },
        _any_flow,
    ),
    "AnyFlowFARTransformer3DModel": Case(
        {
            "patch_size": (1, 2, 2),
            "compressed_patch_size": (1, 4, 4),
            "full_chunk_limit": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 20,
            "freq_dim": 32,
            "ffn_dim": 80,
            "num_layers": 5,
            "rope_max_seq_len": 64,
            "chunk_partition": (1, 3, 3),
        },
        _any_flow_far,
    ),
    "ChronoEditTransformer3DModel": Case(
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 3,
            "attention_head_dim": 18,
            "in_channels": 12,
            "out_channels": 4,
            "text_dim": 20,
            "freq_dim": 32,
            "ffn_dim": 80,
            "num_layers": 5,
            "image_dim": 28,
            "added_kv_proj_dim": 54,
            "rope_max_seq_len": 64,
            "rope_temporal_skip_len": 8,
        },
        _chrono_edit,
    ),
    "CogVideoXTransformer3DModel": Case(
        {
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 28,
            "text_embed_dim": 20,
            "num_layers": 5,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": 10,
            "use_rotary_positional_embeddings": True,
        },
        _cogvideox,
    ),
    "ConsisIDTransformer3DModel": Case(
        {
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "in_channels": 8,
            "out_channels": 4,
            "time_embed_dim": 28,
            "text_embed_dim": 20,
            "num_layers": 6,
            "sample_width": 12,
            "sample_height": 10,
            "sample_frames": 9,
            "max_text_seq_length": 14,
            "use_rotary_positional_embeddings": True,
            "is_train_face": True,
            "is_kps": False,
            "cross_attn_interval": 3,
            "cross_attn_dim_head": 18,
            "cross_attn_num_heads": 1,
            "LFE_id_dim": 44,
            "LFE_vit_dim": 24,
            "LFE_depth": 10,
            "LFE_dim_head": 22,
            "LFE_num_heads": 1,
            "LFE_num_id_token": 5,
            "LFE_num_querie": 13,
            "LFE_output_dim": 32,
            "LFE_ff_mult": 2,
            "LFE_num_scale": 2,
        },
        _consis_id,
    ),
    "Cosmos3OmniTransformer": Case(
        {
            "head_dim": 16,
            "hidden_size": 64,
            "intermediate_size": 80,
            "latent_channel": 4,
            "latent_patch_size": 2,
            "num_attention_heads": 6,
            "num_hidden_layers": 5,
            "num_key_value_heads": 3,
            "patch_latent_dim": 16,
            "rope_axes_dim": (4, 2, 2),
            "unified_3d_mrope_temporal_modality_margin": 100,
            "vocab_size": 50,
        },
        _cosmos3,
    ),
    # Every published Cosmos has `concat_padding_mask`, but its resizing needs torchvision, which is not installed here.
    "CosmosTransformer3DModel": Case(
        {
            "in_channels": 7,  # the latents and the mask of the frames that are given
            "out_channels": 6,
            "num_attention_heads": 3,
            "attention_head_dim": 18,
            "num_layers": 5,
            "text_embed_dim": 20,
            "adaln_lora_dim": 10,
            "max_size": (8, 24, 24),
            "patch_size": (1, 2, 2),
            "concat_padding_mask": False,
        },
        _cosmos,
    ),
}
