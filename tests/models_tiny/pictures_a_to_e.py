"""Tiny models of diffusers' transformer classes that make pictures, from AuraFlow to Ernie."""

from __future__ import annotations

from typing import Any

import torch

from tests.models_tiny.case import Case
from tests.models_tiny.draws import both, grid_ids, normals, padding


def _aura_flow() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 4, 8, 12),
        "encoder_hidden_states": noise(2, 9, 20),
        "timestep": both(0.7),
        "return_dict": False,
        "attention_kwargs": None,
    }


def _bria_fibo2() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 4, 8, 12),
        "timestep": both(0.7),
        "encoder_hidden_states": noise(2, 3, 11, 20),  # the perceiver's text, then that of each block that reads text
        "encoder_attention_mask": padding(11, 6).bool(),
        "context_latents": None,
        "return_dict": False,
    }


def _bria_fibo() -> dict[str, Any]:
    noise = normals()
    real = torch.cat([padding(9, 6), torch.ones(2, 24)], dim=1).bool()
    return {
        "hidden_states": noise(2, 24, 14),
        "timestep": both(700.0),
        "encoder_hidden_states": noise(2, 9, 40),
        "text_encoder_layers": [noise(2, 9, 20) for _ in range(12)],  # one for each of the 5 + 7 blocks
        "joint_attention_kwargs": {"attention_mask": real[:, None, None, :]},
        "return_dict": False,
        "txt_ids": torch.zeros(9, 3),
        "img_ids": grid_ids(4, 6),
    }


def _bria() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 24, 14),
        "timestep": both(700.0),
        "encoder_hidden_states": noise(2, 9, 40),
        "attention_kwargs": None,
        "return_dict": False,
        "txt_ids": torch.zeros(9, 3),
        "img_ids": grid_ids(4, 6),
    }


def _chroma() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 24, 14),
        "timestep": both(0.7),
        "encoder_hidden_states": noise(2, 9, 40),
        "txt_ids": torch.zeros(9, 3),
        "img_ids": grid_ids(4, 6),
        "attention_mask": torch.cat([padding(9, 6).float(), torch.ones(2, 24)], dim=1),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def _cogview3_plus() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 4, 8, 12),
        "encoder_hidden_states": noise(2, 9, 20),
        "timestep": torch.tensor(700).expand(2),
        "original_size": torch.tensor([[64.0, 96.0]] * 2),
        "target_size": torch.tensor([[64.0, 96.0]] * 2),
        "crop_coords": torch.zeros(2, 2),
        "return_dict": False,
    }


def _cogview4() -> dict[str, Any]:
    return _cogview3_plus() | {"timestep": both(700.0), "attention_kwargs": None}


def _dit() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 4, 8, 8),
        "timestep": torch.tensor(700).expand(2),
        "class_labels": torch.tensor([3, 10]),  # the second is the class of the unconditional branch
    }


def _dreamlite() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 24, 4, 6),
        "encoder_hidden_states": noise(2, 9, 20),
        "cross_attention_kwargs": None,
        "attention_mask": None,
        "encoder_attention_mask": (1 - padding(9, 6)[:, None].float()) * -10000.0,
        "return_dict": False,
    }


def _ernie() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 12, 4, 6),
        "timestep": both(700.0).contiguous(),
        "text_bth": noise(2, 9, 20) * padding(9, 6)[:, :, None],
        "text_lens": torch.tensor([9, 6]),
        "return_dict": False,
    }


PICTURES: dict[str, Case | str] = {
    "AuraFlowTransformer2DModel": Case(
        {
            "sample_size": 10,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 5,
            "num_single_dit_layers": 7,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 20,
            "caption_projection_dim": 48,
            "pos_embed_max_size": 64,
        },
        _aura_flow,
    ),
    "BriaFibo2Transformer2DModel": Case(
        {
            "in_channels": 4,
            "patch_size": 2,
            "dim": 96,
            "n_layers": 7,
            "n_refiner_layers": 5,
            "n_heads": 6,
            "cap_feat_dim": 20,
            "injection_layer_ids": (1, 5),
            "perceiver_num_layers": 4,
            "min_num_gist_tokens": 8,
            "max_num_gist_tokens": 16,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 14,
            "axes_dims": (4, 6, 6),
            "axes_lens": (64, 32, 32),
        },
        _bria_fibo2,
    ),
    "BriaFiboTransformer2DModel": Case(
        {
            "patch_size": 1,
            "in_channels": 14,
            "num_layers": 5,
            "num_single_layers": 7,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 40,
            "axes_dims_rope": (4, 6, 6),
            "text_encoder_dim": 20,
        },
        _bria_fibo,
    ),
    "BriaTransformer2DModel": Case(
        {
            "patch_size": 1,
            "in_channels": 14,
            "num_layers": 5,
            "num_single_layers": 7,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 40,
            "axes_dims_rope": (4, 6, 6),
        },
        _bria,
    ),
    "ChromaTransformer2DModel": Case(
        {
            "patch_size": 1,
            "in_channels": 14,
            "num_layers": 5,
            "num_single_layers": 7,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 40,
            "axes_dims_rope": (4, 6, 6),
            "approximator_num_channels": 32,
            "approximator_hidden_dim": 56,
            "approximator_layers": 2,
        },
        _chroma,
    ),
    "CogView3PlusTransformer2DModel": Case(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 5,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "text_embed_dim": 20,
            "time_embed_dim": 28,
            "condition_dim": 8,
            "pos_embed_max_size": 14,
            "sample_size": 12,
        },
        _cogview3_plus,
    ),
    "CogView4Transformer2DModel": Case(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 5,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "text_embed_dim": 20,
            "time_embed_dim": 28,
            "condition_dim": 10,
            "pos_embed_max_size": 14,
            "sample_size": 12,
            "rope_axes_dim": (64, 64),
        },
        _cogview4,
    ),
    "DiTTransformer2DModel": Case(
        {
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 6,
            "num_layers": 5,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 10,
        },
        _dit,
    ),
    # A part of DreamLite's U-Net, which calls it on its feature maps.
    "DreamLiteTransformer2DModel": Case(
        {
            "num_attention_heads": 6,
            "attention_head_dim": 16,
            "in_channels": 24,
            "num_layers": 5,
            "norm_num_groups": 8,
            "cross_attention_dim": 20,
            "use_linear_projection": True,
            "qk_norm": "rms_norm",
            "ff_mult": 3,
        },
        _dreamlite,
    ),
    # Its last layer and its modulation start at zero: its first output is zero.
    "ErnieImageTransformer2DModel": Case(
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_layers": 5,
            "ffn_hidden_size": 80,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 1,
            "text_in_dim": 20,
            "rope_axes_dim": (4, 6, 6),
        },
        _ernie,
    ),
}
