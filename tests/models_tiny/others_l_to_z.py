"""Tiny configurations, second half, of transformers of audio, molecules and embeddings and of those within a U-Net."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_rfd4_proteina import CONDITION_KEYS

from tests.models_tiny.case import Case
from tests.models_tiny.draws import normals, padding


def _longcat_audio() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 11, 10),
        "encoder_hidden_states": normal(2, 7, 40),
        "encoder_attention_mask": padding(7, 4).bool(),
        "timestep": torch.tensor([0.6, 0.6]),
        "attention_mask": padding(11, 11).bool(),
        "latent_cond": torch.zeros(2, 11, 10),
    }


def _minimax_music() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 10, 11),
        "timestep": torch.tensor([0.4, 0.4]),
        "return_dict": False,
        "encoder_hidden_states": normal(2, 11, 28),
    }


def _minimax_codes() -> dict[str, Any]:
    """The hidden state of the language model and the codes found so far."""
    return {"inputs_embeds": normals()(2, 7, 48)}


def _rfd4() -> dict[str, Any]:
    """9 tokens of a molecule, of which one is given, without conditions on its atoms; blocks run 3 times."""
    normal, mask = normals(), padding(9, 6).bool()
    given = (torch.arange(9) == 1).repeat(2, 1)
    atoms = ("rasa", "hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal_coord")
    conditioning = {CONDITION_KEYS[name]: torch.zeros(2, 9, 37) for name in atoms} | {
        CONDITION_KEYS["sequence"]: torch.zeros(2, 9, dtype=torch.long),
        CONDITION_KEYS["index_group"]: torch.arange(9).repeat(2, 1),
        "molecule_iid": (torch.arange(9) // 4).repeat(2, 1),
        "molecule_entity_id": torch.zeros(2, 9, dtype=torch.long),
        "token_bond_path_length": (torch.arange(9)[:, None] - torch.arange(9)).abs().repeat(2, 1, 1),
        "is_in_context_conditioning": given,
        "supports_local_latent": mask,
    }
    return {
        "bb_ca": normal(2, 9, 3) * (mask & ~given)[..., None],
        "local_latents": normal(2, 9, 10) * (mask & ~given)[..., None],
        "bb_ca_time": torch.tensor([0.4, 0.4]),
        "local_latents_time": torch.tensor([0.3, 0.3]),
        "padding_mask": mask,
        "token_type": torch.zeros(2, 9, dtype=torch.long),
        "atom37_mask": mask[..., None].expand(-1, -1, 37),
        "conditioning": conditioning,
        "recycle_depth": 3,
        "attention_kwargs": None,
    }


def _stable_audio3() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 10, 11),
        "timestep": torch.tensor([0.6, 0.6]),
        "encoder_hidden_states": normal(2, 7, 40),
        "global_hidden_states": normal(2, 28),
        "encoder_attention_mask": padding(7, 4),
        "return_dict": False,
    }


def _stable_audio() -> dict[str, Any]:
    """11 tokens of sound, one more of the durations; text of 7 tokens, followed by the durations."""
    normal = normals()
    return {
        "hidden_states": normal(2, 10, 11),
        "timestep": torch.tensor([0.6]),
        "encoder_hidden_states": normal(2, 7 + 2, 36),
        "global_hidden_states": normal(2, 1, 44),
        "rotary_embedding": get_1d_rotary_pos_embed(8, 11 + 1, use_real=True, repeat_interleave_real=False),
        "return_dict": False,
    }


def _t5_film() -> dict[str, Any]:
    """A spectrogram of 11 steps, 7 notes, and 9 steps that came before."""
    normal = normals()
    return {
        "encodings_and_masks": [
            (normal(2, 7, 48), padding(7, 4).bool()),
            (normal(2, 9, 48), torch.ones(2, 9, dtype=torch.bool)),
        ],
        "decoder_input_tokens": normal(2, 11, 10),
        "decoder_noise_time": torch.tensor([0.6, 0.6]),
    }


def _prior() -> dict[str, Any]:
    normal = normals()
    return {
        "hidden_states": normal(2, 20),
        "timestep": torch.tensor(600),
        "proj_embedding": normal(2, 20),
        "encoder_hidden_states": normal(2, 7, 20),
        "attention_mask": padding(7, 4).bool(),
    }


def _transformer_2d() -> dict[str, Any]:
    """A call as a U-Net of Stable Diffusion makes it, of which this class is a part."""
    normal = normals()
    return {
        "hidden_states": normal(2, 12, 3, 6),
        "encoder_hidden_states": normal(2, 7, 40),
        "cross_attention_kwargs": None,
        "attention_mask": None,
        "encoder_attention_mask": None,
        "return_dict": False,
    }


def _temporal() -> dict[str, Any]:
    """A call as a U-Net of video makes it, of which this class is a part."""
    normal = normals()
    return {
        "hidden_states": normal(2 * 7, 12, 3, 3),
        "num_frames": 7,
        "cross_attention_kwargs": None,
        "return_dict": False,
    }


OTHERS: dict[str, Case | str] = {
    # The class starts its last layer at zero, so a new model gives zeros.
    "LongCatAudioDiTTransformer": Case(
        {
            "dit_dim": 48,
            "dit_depth": 5,
            "dit_heads": 3,
            "dit_text_dim": 40,
            "latent_dim": 10,
        },
        _longcat_audio,
    ),
    # A language model of codes, which the pipeline calls for each next code; it denoises nothing.
    "MiniMaxMusic3RVQDepthDecoder": Case(
        {
            "hidden_size": 48,
            "num_layers": 5,
            "num_attention_heads": 3,
            "intermediate_size": 80,
            "audio_vocab_size": 24,
            "num_codebooks": 8,
            "max_position_embeddings": 16,
        },
        _minimax_codes,
    ),
    "MiniMaxMusic3Transformer1DModel": Case(
        {
            "in_channels": 10,
            "condition_dim": 28,
            "num_layers": 5,
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "ff_inner_dim": 80,
            "rotary_dim": 8,
            "fourier_embedding_dim": 32,
        },
        _minimax_music,
    ),
    # The four additional embeddings are the pooled text, the time, the noisy image embedding and the query.
    "PriorTransformer": Case(
        {
            "num_attention_heads": 3,
            "attention_head_dim": 8,
            "num_layers": 5,
            "embedding_dim": 20,
            "num_embeddings": 7,
            "additional_embeddings": 4,
        },
        _prior,
    ),
    # Pair updates follow the blocks 0, 2, 4 (never the last); the class keeps them in a dict.
    "RFD4ProteinaTransformer": Case(
        {
            "nlayers": 7,
            "token_dim": 48,
            "nheads": 3,
            "dim_cond": 40,
            "pair_repr_dim": 24,
            "latent_dim": 10,
            "token_type_emb_dim": 12,
            "cath_emb_dim": 14,
            "t_emb_dim": 32,
            "seq_sep_dim": 18,
            "tri_mult_c": 20,
        },
        _rfd4,
    ),
    "StableAudio3DiTModel": Case(
        {
            "io_channels": 10,
            "embed_dim": 48,
            "depth": 5,
            "num_heads": 3,
            "cond_token_dim": 40,
            "global_cond_dim": 28,
            "local_add_cond_dim": 11,
            "timestep_features_dim": 32,
            "num_memory_tokens": 6,
        },
        _stable_audio3,
    ),
    "StableAudioDiTModel": Case(
        {
            "sample_size": 13,
            "in_channels": 10,
            "num_layers": 5,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "out_channels": 10,
            "cross_attention_dim": 36,
            "time_proj_dim": 32,
            "global_states_input_dim": 44,
            "cross_attention_input_dim": 36,
        },
        _stable_audio,
    ),
    "T5FilmDecoder": Case(
        {
            "input_dims": 10,
            "targets_length": 11,
            "d_model": 48,
            "num_layers": 5,
            "num_heads": 3,
            "d_kv": 16,
            "d_ff": 80,
        },
        _t5_film,
    ),
    "Transformer2DModel": Case(
        {
            "num_attention_heads": 3,
            "attention_head_dim": 8,
            "in_channels": 12,
            "num_layers": 5,
            "norm_num_groups": 4,
            "cross_attention_dim": 40,
            "norm_type": "layer_norm",
        },
        _transformer_2d,
    ),
    "TransformerTemporalModel": Case(
        {
            "num_attention_heads": 3,
            "attention_head_dim": 8,
            "in_channels": 12,
            "num_layers": 5,
            "norm_num_groups": 4,
        },
        _temporal,
    ),
}
