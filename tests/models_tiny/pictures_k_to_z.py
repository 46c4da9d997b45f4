"""Tiny configurations of transformers of image pipelines, second half, each with a call as its pipeline makes it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

from tests.models_tiny.case import Case
from tests.models_tiny.draws import grid_ids, line_ids, normals, padding


def _krea2() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 3 * 4, 20),
        "encoder_hidden_states": normal(2, 9, 7, 56),
        "timestep": torch.tensor([0.6, 0.6]),
        "position_ids": torch.cat([torch.zeros(9, 3), grid_ids(3, 4)]),
        "encoder_attention_mask": padding(9, 6).bool(),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _longcat_image() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 3 * 4, 12),
        "timestep": torch.tensor([0.6, 0.6]),
        "guidance": None,
        "encoder_hidden_states": normal(2, 7, 40),
        "txt_ids": line_ids(7),
        "img_ids": grid_ids(3, 4, first=1, start=7),
        "return_dict": False,
    }


def _lumina2() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 6, 8, 6),
        "timestep": torch.tensor([0.4, 0.4]),
        "encoder_hidden_states": normal(2, 7, 40),
        "encoder_attention_mask": padding(7, 4),
        "return_dict": False,
        "attention_kwargs": None,
    }


def _lumina_next() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 4, 8, 6),
        "timestep": torch.tensor([0.4, 0.4]),
        "encoder_hidden_states": normal(2, 7, 40),
        "encoder_mask": padding(7, 4),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 384, 384, linear_factor=1.0, ntk_factor=1.0),
        "cross_attention_kwargs": {"base_sequence_length": 9},
        "return_dict": False,
    }


def _nucleus() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 3 * 4, 20),
        "timestep": torch.tensor([0.6, 0.6]),
        "encoder_hidden_states": normal(2, 9, 40),
        "encoder_hidden_states_mask": padding(9, 6),
        "img_shapes": [(1, 3, 4)] * 2,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _omnigen() -> dict[str, Any]:
    """A prompt and, padded on the left, the empty one; text attends causally, the time token and the image to all."""
    normal, text, image = normals(), 9, 3 * 4
    mask, positions = [], []
    for pads in (0, 4):
        attends = torch.ones(text + 1 + image, text + 1 + image)
        attends[: text + 1] = attends[: text + 1].tril()
        attends[pads:, :pads] = 0
        attends[:pads] = 1
        mask.append(attends)
        positions.append([0] * pads + list(range(text - pads + image + 1)))
    ids = torch.arange(2 * text).view(2, text) + 3
    ids[1, :4] = 60
    return {
        "hidden_states": normal(2, 6, 6, 8),
        "timestep": torch.tensor([0.6, 0.6]),
        "input_ids": ids,
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.stack(mask),
        "position_ids": torch.tensor(positions),
        "return_dict": False,
    }


def _ovis() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 3 * 4, 12),
        "timestep": torch.tensor([0.6, 0.6]),
        "encoder_hidden_states": normal(2, 7, 40),
        "txt_ids": line_ids(7),
        "img_ids": grid_ids(3, 4),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


def _prx() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 6, 6, 8),
        "timestep": torch.tensor([0.6, 0.6]),
        "encoder_hidden_states": normal(2, 7, 40),
        "attention_mask": padding(7, 4).bool(),
        "return_dict": False,
    }


def _pixart() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 4, 6, 8),
        "encoder_hidden_states": normal(2, 7, 40),
        "encoder_attention_mask": padding(7, 4),
        "timestep": torch.tensor([600, 600]),
        "added_cond_kwargs": {"resolution": torch.tensor([[48.0, 64.0]] * 2), "aspect_ratio": torch.full((2, 1), 0.75)},
        "return_dict": False,
    }


def _qwen_image() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 3 * 4, 24),
        "timestep": torch.tensor([0.6, 0.6]),
        "guidance": None,
        "encoder_hidden_states_mask": padding(9, 6),
        "encoder_hidden_states": normal(2, 9, 40),
        "img_shapes": [[(1, 3, 4)]] * 2,
        "attention_kwargs": {},
        "return_dict": False,
    }


def _qwen_image21() -> dict[str, Any]:
    """A text-to-image call without a cache of keys: each True of `img_mask` stands for 2 x 2 tokens of the image."""
    normal = normals()
    return {
        "hidden_states": normal(2, 4 * 6, 20),
        "timestep": torch.tensor([0.6, 0.6]),
        "encoder_hidden_states": normal(2, 9, 40),
        "encoder_hidden_states_mask": padding(9, 7),
        "img_shapes": [[(1, 4, 6)]] * 2,
        "img_mask": (torch.arange(9 + 2 * 3) >= 9).repeat(2, 1),
        "attention_kwargs": {},
        "kv_cache": None,
        "kv_cache_mode": None,
        "return_dict": False,
    }


def _sd3() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 6, 6, 8),
        "timestep": torch.tensor([600.0, 600.0]),
        "encoder_hidden_states": normal(2, 7, 40),
        "pooled_projections": normal(2, 28),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def _sana() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 6, 3, 4),
        "encoder_hidden_states": normal(2, 7, 40),
        "encoder_attention_mask": padding(7, 4),
        "timestep": torch.tensor([600.0, 600.0]),
        "return_dict": False,
        "attention_kwargs": {},
    }


def _z_image() -> dict[str, Any]:
    """Lists of samples: 80 tokens of an image, which the model pads to 96, and texts, padded to 32 and 64."""
    normal = normals()
    return {
        "x": [normal(6, 1, 16, 20) for _ in range(2)],
        "t": torch.tensor([0.4, 0.4]),
        "cap_feats": [normal(9, 40), normal(37, 40)],
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


PICTURES: dict[str, Case | str] = {
    "Krea2Transformer2DModel": Case(
        {
            "in_channels": 20,
            "num_layers": 5,
            "attention_head_dim": 16,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "intermediate_size": 160,
            "timestep_embed_dim": 32,
            "text_hidden_dim": 56,
            "num_text_layers": 7,
            "text_num_attention_heads": 4,
            "text_num_key_value_heads": 4,
            "text_intermediate_size": 80,
            "num_layerwise_text_blocks": 2,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        },
        _krea2,
    ),
    "LongCatImageTransformer2DModel": Case(
        {
            "in_channels": 12,
            "num_layers": 4,
            "num_single_layers": 6,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 40,
            "pooled_projection_dim": 28,
            "axes_dims_rope": [4, 6, 6],
        },
        _longcat_image,
    ),
    "Lumina2Transformer2DModel": Case(
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 6,
            "hidden_size": 96,
            "num_layers": 5,
            "num_refiner_layers": 3,
            "num_attention_heads": 8,
            "num_kv_heads": 4,
            "multiple_of": 16,
            "axes_dim_rope": (4, 4, 4),
            "axes_lens": (30, 20, 20),
            "cap_feat_dim": 40,
        },
        _lumina2,
    ),
    "LuminaNextDiT2DModel": Case(
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 96,
            "num_layers": 5,
            "num_attention_heads": 6,
            "num_kv_heads": 3,
            "multiple_of": 24,
            "cross_attention_dim": 40,
        },
        _lumina_next,
    ),
    # The default strategy keeps the first three blocks and the last dense: of 8 blocks, 4 have experts.
    "NucleusMoEImageTransformer2DModel": Case(
        {
            "patch_size": 2,
            "in_channels": 20,
            "out_channels": 5,
            "num_layers": 8,
            "attention_head_dim": 16,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "joint_attention_dim": 40,
            "axes_dims_rope": (4, 6, 6),
            "num_experts": 10,
            "moe_intermediate_dim": 24,
            "capacity_factors": 4.0,
        },
        _nucleus,
    ),
    "OmniGenTransformer2DModel": Case(
        {
            "in_channels": 6,
            "patch_size": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 80,
            "num_layers": 5,
            "pad_token_id": 60,
            "vocab_size": 70,
            "max_position_embeddings": 112,
            "original_max_position_embeddings": 56,
            "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.5] * 8},
            "pos_embed_max_size": 12,
            "time_step_dim": 32,
        },
        _omnigen,
    ),
    "OvisImageTransformer2DModel": Case(
        {
            "in_channels": 12,
            "out_channels": 12,
            "num_layers": 4,
            "num_single_layers": 6,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 40,
            "axes_dims_rope": (4, 6, 6),
        },
        _ovis,
    ),
    "PRXTransformer2DModel": Case(
        {
            "in_channels": 6,
            "patch_size": 2,
            "context_in_dim": 40,
            "hidden_size": 48,
            "num_heads": 3,
            "depth": 5,
            "axes_dim": [8, 8],
        },
        _prx,
    ),
    # At this size of sample the class is also given the resolution and the ratio of the sides.
    "PixArtTransformer2DModel": Case(
        {
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 5,
            "cross_attention_dim": 48,
            "sample_size": 128,
            "patch_size": 2,
            "caption_channels": 40,
        },
        _pixart,
    ),
    "QwenImage21Transformer2DModel": Case(
        {
            "in_channels": 20,
            "out_channels": 20,
            "num_layers": 5,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "context_in_dim": 40,
            "mlp_ratio": 3,
            "axes_dims_rope": (4, 6, 6),
        },
        _qwen_image21,
    ),
    "QwenImageTransformer2DModel": Case(
        {
            "patch_size": 2,
            "in_channels": 24,
            "out_channels": 6,
            "num_layers": 5,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 40,
            "axes_dims_rope": (4, 6, 6),
        },
        _qwen_image,
    ),
    # As Stable Diffusion 3.5 large; 3.5 medium names blocks with a second attention (`dual_attention_layers`).
    "SD3Transformer2DModel": Case(
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 6,
            "out_channels": 6,
            "num_layers": 5,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 40,
            "caption_projection_dim": 48,
            "pooled_projection_dim": 28,
            "pos_embed_max_size": 20,
            "qk_norm": "rms_norm",
        },
        _sd3,
    ),
    "SanaTransformer2DModel": Case(
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
            "sample_size": 32,
        },
        _sana,
    ),
    "ZImageTransformer2DModel": Case(
        {
            "in_channels": 6,
            "dim": 64,
            "n_layers": 5,
            "n_refiner_layers": 3,
            "n_heads": 4,
            "n_kv_heads": 4,
            "cap_feat_dim": 40,
            "axes_dims": [4, 6, 6],
            "axes_lens": [128, 48, 48],
        },
        _z_image,
    ),
}
