"""Tiny configurations of transformers of video pipelines, second half, each with a call as its pipeline makes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed
from diffusers.models.transformers.transformer_sana_wm_refiner import (
    SanaWMLTX2AudioVideoRotaryPosEmbed,
    SanaWMRefinerKVCache,
)
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from diffusers.pipelines.sana_wm.cam_utils import prepare_camera

from tests.models_tiny.case import Case
from tests.models_tiny.draws import normals, padding

CPU = torch.device("cpu")


def _ltx2() -> dict[str, Any]:
    """2 frames of 2 x 3 tokens, 9 tokens of sound, 7 of text."""
    normal = normals()
    video = LTX2AudioVideoRotaryPosEmbed(dim=64, modality="video", num_attention_heads=4)
    audio = LTX2AudioVideoRotaryPosEmbed(dim=32, modality="audio", scale_factors=[4], num_attention_heads=4)
    mask = padding(7, 4)
    return {
        "hidden_states": normal(2, 2 * 2 * 3, 10),
        "audio_hidden_states": normal(2, 9, 14),
        "encoder_hidden_states": normal(2, 7, 40) * mask[..., None],
        "audio_encoder_hidden_states": normal(2, 7, 40),
        "timestep": torch.tensor([600.0, 600.0]),
        "sigma": torch.tensor([600.0, 600.0]),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": 2,
        "height": 2,
        "width": 3,
        "fps": 24.0,
        "audio_num_frames": 9,
        "video_coords": video.prepare_video_coords(2, 2, 2, 3, CPU, fps=24.0),
        "audio_coords": audio.prepare_audio_coords(2, 9, CPU),
        "isolate_modalities": False,
        "spatio_temporal_guidance_blocks": None,
        "perturbation_mask": None,
        "use_cross_timestep": True,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _ltx() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 2 * 2 * 3, 10),
        "encoder_hidden_states": normal(2, 7, 40),
        "timestep": torch.tensor([600.0, 600.0]),
        "encoder_attention_mask": padding(7, 4).bool(),
        "num_frames": 2,
        "height": 2,
        "width": 3,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _latte() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 5, 3, 4, 8),
        "encoder_hidden_states": normal(2, 7, 40),
        "timestep": torch.tensor([600, 600]),
        "enable_temporal_attentions": True,
        "return_dict": False,
    }


def _minimax_h3() -> dict[str, Any]:
    """One packed sequence: 7 tokens of text, 2 channels of 5 tokens of sound, 2 frames of 2 x 3 tokens.

    The pipeline makes no batches. Text and video share a timestep, the sound has its own.
    """
    normal, text, sound, frames, rows = normals(), 7, 5, 2, 2 * 3
    of_sound, of_video = torch.arange(text, text + 2 * sound), torch.arange(text + 2 * sound, 29)
    positions = torch.zeros(29, 3, dtype=torch.float64)
    positions[:text, 0] = torch.arange(text)
    positions[of_sound, 0] = text + torch.arange(sound).double().repeat(2)
    positions[of_sound, 2] = torch.tensor([0.0, 26.0], dtype=torch.float64).repeat_interleave(sound)
    positions[of_video, 0] = torch.tensor([7.0, 7 + 5 / 3], dtype=torch.float64).repeat_interleave(rows)
    positions[of_video, 1] = torch.tensor([0.0, 13.0], dtype=torch.float64).repeat_interleave(3).repeat(frames)
    positions[of_video, 2] = torch.tensor([0.0, 13.0, 26.0], dtype=torch.float64).repeat(2 * frames)
    tags = torch.full((29,), 1)
    tags[of_sound], tags[of_video] = 2, 0
    timesteps = torch.full((29,), 0.4)
    timesteps[of_sound] = 0.3
    unique, indices = torch.unique(timesteps, sorted=True, return_inverse=True)
    return {
        "hidden_states": normal(1, frames * rows, 24),
        "audio_hidden_states": normal(1, 2 * sound, 10),
        "encoder_hidden_states": normal(1, text, 36),
        "timestep": unique,
        "timestep_indices": indices,
        "attention_kwargs": None,
        "return_dict": False,
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": of_video,
        "audio_indices": of_sound,
        "text_indices": torch.arange(text),
    }


def _mochi() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 6, 2, 4, 6),
        "encoder_hidden_states": normal(2, 7, 40),
        "timestep": torch.tensor([600.0, 600.0]),
        "encoder_attention_mask": padding(7, 4).bool(),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _motif() -> dict[str, Any]:
    """Latents, beside them the latents of no first frame and their mask."""
    normal = normals()
    return {
        "hidden_states": torch.cat([normal(2, 8, 2, 4, 6), torch.zeros(2, 9, 2, 4, 6)], dim=1),
        "timestep": torch.tensor([600.0, 600.0]),
        "attention_kwargs": None,
        "return_dict": False,
        "encoder_hidden_states": normal(2, 9, 40),
        "encoder_attention_mask": padding(9, 6),
    }


def _sana_video() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 6, 2, 4, 6),
        "encoder_hidden_states": normal(2, 7, 40),
        "encoder_attention_mask": padding(7, 4),
        "timestep": torch.tensor([600.0, 600.0]),
        "return_dict": False,
        "attention_kwargs": {},
    }


def _sana_refiner() -> dict[str, Any]:
    """2 frames of 2 x 3 tokens that also attend to 1 kept frame, whose keys and values each block of the 5 has cached.

    The model refuses a cache of another number of blocks than its own.
    """
    normal, rows = normals(), 2 * 3
    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(dim=64, modality="video", num_attention_heads=4)
    cos, sin = rope(rope.prepare_video_coords(2, 3, 2, 3, CPU, fps=16.0))
    cache = SanaWMRefinerKVCache(5)
    cache.sink_pe = (cos[:, :rows], sin[:, :rows])
    for layer in cache.layer_caches:
        layer.store_sink(normal(2, rows, 64), normal(2, rows, 64))
    return {
        "hidden_states": normal(2, 2 * rows, 10),
        "encoder_hidden_states": normal(2, 7, 40),
        "timestep": torch.full((2, 2 * rows), 600.0),
        "video_rotary_emb": (cos[:, rows:], sin[:, rows:]),
        "encoder_attention_mask": padding(7, 4),
        "kv_cache": cache,
        "kv_cache_mode": "inject",
        "return_dict": False,
    }


def _sana_wm() -> dict[str, Any]:
    """17 frames filmed by a camera that goes to the right: 3 latent frames of 2 x 4 tokens, the first one given."""
    normal = normals()
    poses = np.tile(np.eye(4), (17, 1, 1))
    poses[:, 0, 3] = np.linspace(0, 1, 17)
    lenses = np.tile([96.0, 96.0, 64.0, 32.0], (17, 1))
    camera = prepare_camera(poses, lenses, target_size=(64, 128), vae_stride=(8, 32, 32))
    return {
        "hidden_states": normal(2, 6, 3, 2, 4),
        "timestep": torch.tensor([0.0, 600.0, 600.0]).repeat(2, 1, 1),
        "encoder_hidden_states": normal(2, 1, 7, 40),
        "return_dict": False,
        "data_info": {"img_hw": torch.tensor([[64.0, 128.0]])},
        "mask": padding(7, 4),
        "camera_conditions": camera["raymap"].repeat(2, 1, 1),
        "chunk_plucker": camera["chunk_plucker"].repeat(2, 1, 1, 1, 1),
    }


def _wan() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 6, 2, 4, 6),
        "timestep": torch.tensor([600, 600]),
        "encoder_hidden_states": normal(2, 7, 40),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _wan_vace() -> dict[str, Any]:
    normal = normals()
    return _wan() | {
        "control_hidden_states": normal(2, 2 * 6 + 64, 2, 4, 6),
        "control_hidden_states_scale": torch.ones(3),
    }


def _wan_animate() -> dict[str, Any]:
    """3 latent frames, the first of them the person, and 5 pictures of a face; 512 tokens of text.

    The class takes the last 512 tokens for the text.
    """
    normal = normals()
    return {
        "hidden_states": normal(2, 18, 3, 4, 6),
        "timestep": torch.tensor([600, 600]),
        "encoder_hidden_states": normal(2, 512, 40),
        "encoder_hidden_states_image": normal(2, 11, 20),
        "pose_hidden_states": normal(2, 7, 2, 4, 6),
        "face_pixel_values": normal(2, 3, 5, 16, 16),
        "motion_encode_batch_size": None,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _wan_animate2() -> dict[str, Any]:
    """The pass over the driving video, of one sample, that fills the cache of the 5 blocks.

    The passes that denoise need a compiled `flex_attention`.
    """
    normal = normals()
    return {
        "hidden_states": [normal(6, 2, 4, 6)],
        "timestep": torch.tensor([999.0]),
        "encoder_hidden_states": [normal(7, 40)],
        "encoder_hidden_states_image": normal(1, 11, 1280),
        "condition_latents": [normal(10, 2, 4, 6)],
        "kv_cache": WanAnimate2KVCache(5),
        "kv_cache_mode": "extract",
        "seq_len": 2 * 2 * 3,
        "offset_grid_sizes": torch.tensor([[2, 2, 3]]),
    }


_WAN: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 6,
    "out_channels": 6,
    "text_dim": 40,
    "freq_dim": 32,
    "ffn_dim": 80,
    "num_layers": 5,
}

# Both streams' widths are those of their cross-attentions, as in the published models.
_LTX2: dict[str, Any] = {
    "in_channels": 10,
    "out_channels": 10,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "cross_attention_dim": 64,
    "audio_in_channels": 14,
    "audio_out_channels": 14,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 32,
    "num_layers": 5,
    "caption_channels": 40,
}

VIDEOS: dict[str, Case | str] = {
    "LTX2VideoTransformer3DModel": Case(_LTX2, _ltx2),
    "LTXVideoTransformer3DModel": Case(
        {
            "in_channels": 10,
            "out_channels": 10,
            "num_attention_heads": 4,
            "attention_head_dim": 12,
            "cross_attention_dim": 48,
            "num_layers": 5,
            "caption_channels": 40,
        },
        _ltx,
    ),
    # A block of each of the two stacks by turns; one key counts both.
    "LatteTransformer3DModel": Case(
        {
            "num_attention_heads": 6,
            "attention_head_dim": 8,
            "in_channels": 5,
            "out_channels": 10,
            "num_layers": 4,
            "cross_attention_dim": 48,
            "attention_bias": True,
            "sample_size": 32,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": 40,
            "video_length": 3,
        },
        _latte,
    ),
    "MiniMaxH3Transformer3DModel": Case(
        {
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "hidden_size": 40,
            "num_layers": 5,
            "num_refiner_layers": 4,
            "ffn_dim": 56,
            "in_channels": 6,
            "audio_in_channels": 10,
            "text_dim": 36,
            "freq_dim": 32,
            "time_embed_hidden_dim": 44,
            "time_embed_dim": 28,
            "rope_freq_dim": 2,
        },
        _minimax_h3,
    ),
    "MochiTransformer3DModel": Case(
        {
            "num_attention_heads": 4,
            "attention_head_dim": 12,
            "num_layers": 5,
            "pooled_projection_dim": 28,
            "in_channels": 6,
            "text_embed_dim": 40,
            "time_embed_dim": 32,
            "max_sequence_length": 7,
        },
        _mochi,
    ),
    # The last 3 of the 7 single blocks are the decoder: a second chain, from the patches, given what the first found.
    "MotifVideoTransformer3DModel": Case(
        {
            "in_channels": 17,
            "out_channels": 8,
            "num_attention_heads": 6,
            "attention_head_dim": 16,
            "num_layers": 4,
            "num_single_layers": 7,
            "num_decoder_layers": 3,
            "text_embed_dim": 40,
            "rope_axes_dim": (4, 6, 6),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        _motif,
    ),
    "SanaVideoTransformer3DModel": Case(
        {
            "in_channels": 6,
            "out_channels": 6,
            "num_attention_heads": 4,
            "attention_head_dim": 12,
            "num_layers": 5,
            "num_cross_attention_heads": 3,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 48,
            "caption_channels": 40,
        },
        _sana_video,
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Case(_LTX2, _sana_refiner),
    # Every fourth block has another attention than the rest.
    "SanaWMTransformer3DModel": Case(
        {
            "in_channels": 6,
            "num_layers": 5,
            "hidden_size": 48,
            "num_attention_heads": 2,
            "linear_head_dim": 16,
            "caption_channels": 40,
        },
        _sana_wm,
    ),
    "SkyReelsV2Transformer3DModel": Case(_WAN, _wan),
    # Blocks wider than the other cases': the class fixes the width of the person's picture to 1280.
    "WanAnimate2Transformer3DModel": Case(
        {
            "text_len": 9,
            "in_dim": 16,
            "dim": 96,
            "ffn_dim": 256,
            "freq_dim": 32,
            "text_dim": 40,
            "out_dim": 6,
            "num_heads": 8,
            "num_layers": 5,
        },
        _wan_animate2,
    ),
    # Blocks 0 and 3 are followed by a block of the face adapter; the class needs a multiple of 3 blocks.
    "WanAnimateTransformer3DModel": Case(
        _WAN
        | {
            "in_channels": 18,
            "latent_channels": 7,
            "out_channels": 7,
            "num_layers": 6,
            "image_dim": 20,
            "added_kv_proj_dim": 48,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 14,
            "motion_dim": 10,
            "motion_encoder_dim": 24,
            "face_encoder_hidden_dim": 22,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 3,
            "motion_encoder_batch_size": 9,
        },
        _wan_animate,
    ),
    "WanTransformer3DModel": Case(_WAN, _wan),
    # Blocks 0, 2 and 4 of the 7 get what the 3 side blocks have found.
    "WanVACETransformer3DModel": Case(
        _WAN | {"num_layers": 7, "vace_layers": [0, 2, 4], "vace_in_channels": 2 * 6 + 64}, _wan_vace
    ),
}
