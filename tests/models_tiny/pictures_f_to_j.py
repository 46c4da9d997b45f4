"""Tiny models of diffusers' transformer classes that make pictures, from Flux to JoyImage."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from torch import Tensor

from tests.models_tiny.case import Case
from tests.models_tiny.draws import both, grid_ids, normals, padding


def _flux() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 24, 14),
        "timestep": both(0.7),
        "guidance": both(3.5),
        "pooled_projections": noise(2, 28),
        "encoder_hidden_states": noise(2, 9, 40),
        "txt_ids": torch.zeros(9, 3),
        "img_ids": grid_ids(4, 6),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def _four_ids(height: int, width: int, length: int) -> Tensor:
    """Return the position ids (token, 4) of FLUX.2 and FLUX.3: frame, row, column and place in the text."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(length))


def _flux2() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 24, 14),
        "timestep": both(0.7),
        "guidance": both(4.0),
        "encoder_hidden_states": noise(2, 9, 40),
        "txt_ids": _four_ids(1, 1, 9).expand(2, -1, -1),
        "img_ids": _four_ids(4, 6, 1).expand(2, -1, -1),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def _flux3() -> dict[str, Any]:
    """A picture made from another one: without it the stack `mode_blocks.image_cond` is not called."""
    noise = normals()
    half = torch.tensor([1.0, 0.5, 0.5, 1.0])  # the scale of rows and columns that FLUX.3 was trained with
    return {
        "hidden_states": noise(2, 24, 14),
        "timestep": both(0.7),
        "img_ids": _four_ids(4, 6, 1) * half,
        "image_cond_hidden_states": noise(2, 12, 18),
        "image_cond_ids": _four_ids(3, 4, 1) * half - torch.tensor([0.0, 0.0, 0.0, 1.0]),
        "encoder_hidden_states": noise(2, 9, 40),
        "txt_ids": _four_ids(1, 1, 9).float(),
        "return_dict": False,
    }


def _glm_image() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 4, 8, 12),
        "encoder_hidden_states": noise(2, 9, 20),
        "prior_token_id": torch.arange(48).view(2, 24),
        "prior_token_drop": torch.zeros(2, 24, dtype=torch.bool),
        "timestep": both(699.0),
        "target_size": torch.tensor([[64.0, 96.0]] * 2),
        "crop_coords": torch.zeros(2, 2),
        "attention_kwargs": None,
        "return_dict": False,
        "kv_caches": GlmImageKVCache(num_layers=5),  # holds nothing where no picture is given
    }


def _hidream() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 4, 8, 12),
        "timesteps": both(700.0),
        "encoder_hidden_states_t5": noise(2, 11, 20),
        "encoder_hidden_states_llama3": noise(4, 2, 9, 40),  # the hidden states of four layers of Llama
        "pooled_embeds": noise(2, 28),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _hunyuan_dit() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 4, 8, 12),
        "timestep": both(700.0).contiguous(),
        "encoder_hidden_states": noise(2, 9, 20),
        "text_embedding_mask": padding(9, 6),
        "encoder_hidden_states_t5": noise(2, 11, 24),
        "text_embedding_mask_t5": padding(11, 7),
        "image_meta_size": torch.tensor([[64.0, 96.0, 64.0, 96.0, 0.0, 0.0]] * 2),
        "style": torch.tensor([0, 0]),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), (4, 6)), (4, 6), output_type="pt"),
        "return_dict": False,
    }


def _hunyuan_image() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 8, 4, 6),
        "timestep": both(700.0),
        "timestep_r": None,
        "guidance": None,
        "attention_kwargs": {},
        "return_dict": False,
        "encoder_hidden_states": noise(2, 9, 20),
        "encoder_attention_mask": padding(9, 6),
        "encoder_hidden_states_2": noise(2, 11, 26),
        "encoder_attention_mask_2": padding(11, 0),  # the second prompt asks for no written text
    }


def _ideogram4() -> dict[str, Any]:
    """Text of 9 and of 6 tokens, the latter padded on the left, and a picture of 4 x 6 tokens in one sequence."""
    noise = normals()
    padded = torch.arange(33) < torch.tensor([0, 3])[:, None]
    is_text = (torch.arange(33) < 9).expand(2, 33)
    grid = grid_ids(4, 6).long() + 65536  # where the class begins the positions of a picture
    text = (torch.arange(9) - torch.tensor([0, 3])[:, None]).clamp(min=0)[:, :, None].expand(2, 9, 3)
    return {
        "hidden_states": torch.cat([torch.zeros(2, 9, 12), noise(2, 24, 12)], dim=1),
        "timestep": both(0.3),
        "encoder_hidden_states": noise(2, 33, 40) * (is_text & ~padded)[:, :, None],
        "position_ids": torch.cat([text, grid.expand(2, 24, 3)], dim=1),
        "segment_ids": torch.where(padded, -1, 1),
        "indicator": torch.where(padded, 0, torch.where(is_text, 3, 2)),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _joy_image_edit() -> dict[str, Any]:
    noise = normals()
    return {
        "hidden_states": noise(2, 2, 4, 1, 8, 12),  # the given picture, then the noise
        "timestep": both(700.0),
        "encoder_hidden_states": noise(2, 9, 20),
        "return_dict": False,
    }


def _joy_image_edit_plus() -> dict[str, Any]:
    """24 patches of noise each, and a given picture of 6 patches for the first sample only."""
    noise = normals()
    return {
        "hidden_states": noise(2, 30, 4, 1, 2, 2) * padding(30, 24)[:, :, None, None, None, None],
        "timestep": both(700.0),
        "encoder_hidden_states": noise(2, 9, 20),
        "encoder_hidden_states_mask": padding(9, 6),
        "shape_list": [[(1, 4, 6), (1, 2, 3)], [(1, 4, 6)]],
        "return_dict": False,
    }


PICTURES: dict[str, Case | str] = {
    "FluxTransformer2DModel": Case(
        {
            "patch_size": 1,
            "in_channels": 14,
            "num_layers": 5,
            "num_single_layers": 7,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 40,
            "pooled_projection_dim": 28,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
        _flux,
    ),
    "Flux2Transformer2DModel": Case(
        {
            "patch_size": 1,
            "in_channels": 14,
            "num_layers": 5,
            "num_single_layers": 7,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 40,
            "timestep_guidance_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        _flux2,
    ),
    "Flux3Transformer2DModel": Case(
        {
            "in_channels": 14,
            "cond_in_channels": 18,
            "num_layers": 5,
            "num_single_layers": 7,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 40,
            "timestep_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        _flux3,
    ),
    "GlmImageTransformer2DModel": Case(
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
            "prior_vq_quantizer_codebook_size": 50,
        },
        _glm_image,
    ),
    "HiDreamImageTransformer2DModel": Case(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 5,
            "num_single_layers": 7,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "caption_channels": [20, 40],
            "text_emb_dim": 28,
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "axes_dims_rope": (8, 4, 4),
            "max_resolution": (8, 15),  # 30 tokens, to which the 24 of a picture that is no square are padded
            "llama_layers": [0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3],  # one for each of the 5 + 7 blocks
        },
        _hidream,
    ),
    "HunyuanDiT2DModel": Case(
        {
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 48,
            "num_layers": 6,  # even: the second half reads the first half's outputs
            "cross_attention_dim": 20,
            "cross_attention_dim_t5": 24,
            "pooled_projection_dim": 28,
            "text_len": 9,
            "text_len_t5": 11,
        },
        _hunyuan_dit,
    ),
    "HunyuanImageTransformer2DModel": Case(
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 3,
            "attention_head_dim": 24,
            "num_layers": 5,
            "num_single_layers": 7,
            "num_refiner_layers": 4,
            "patch_size": (1, 1),
            "text_embed_dim": 20,
            "text_embed_2_dim": 26,
            "rope_axes_dim": (12, 12),
        },
        _hunyuan_image,
    ),
    "Ideogram4Transformer2DModel": Case(
        {
            "in_channels": 12,
            "num_layers": 5,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "intermediate_size": 80,
            "adaln_dim": 28,
            "llm_features_dim": 40,
            "mrope_section": (4, 2, 2),
        },
        _ideogram4,
    ),
    "JoyImageEditTransformer3DModel": Case(
        {
            "patch_size": [1, 2, 2],
            "in_channels": 4,
            "hidden_size": 48,
            "num_attention_heads": 3,
            "text_dim": 20,
            "num_layers": 5,
            "rope_dim_list": [4, 6, 6],
        },
        _joy_image_edit,
    ),
    "JoyImageEditPlusTransformer3DModel": Case(
        {
            "patch_size": [1, 2, 2],
            "in_channels": 4,
            "hidden_size": 48,
            "num_attention_heads": 3,
            "text_dim": 20,
            "num_layers": 5,
            "rope_dim_list": [4, 6, 6],
        },
        _joy_image_edit_plus,
    ),
}
