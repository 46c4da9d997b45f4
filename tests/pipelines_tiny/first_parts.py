"""Text encoders, tokenizers and autoencoders of the tiny pipelines, all with random weights."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, AutoencoderKLWan
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
    T5GemmaEncoderModel,
    T5GemmaModuleConfig,
    UMT5Config,
    UMT5EncoderModel,
)

from ppcl.families.flux.tiny import build_clip_tokenizer, build_t5_tokenizer
from ppcl.families.qwen_image.tiny import build_tokenizer


def clip(width: int, projected: int | None = None, length: int | None = None) -> tuple[Any, Any]:
    """Returns a CLIP text encoder of this width, with a projection to `projected` if given, and its tokenizer.

    `length`: the most tokens of a text.
    """
    tokenizer = build_clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projected or width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length or tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModel if projected is None else CLIPTextModelWithProjection)(config), tokenizer


def t5(width: int) -> tuple[Any, Any]:
    """Returns a T5 encoder of this width, and its tokenizer."""
    return _t5(T5Config, T5EncoderModel, width)


def umt5(width: int) -> tuple[Any, Any]:
    """Returns a UMT5 encoder of this width, and its tokenizer."""
    return _t5(UMT5Config, UMT5EncoderModel, width)


def _t5(config: Any, model: Any, width: int) -> tuple[Any, Any]:
    tokenizer = build_t5_tokenizer()
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": 2, "num_heads": 4}
    return model(config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **sizes)), tokenizer


def gemma3(width: int) -> tuple[Any, Any]:
    """Returns a Gemma 3 of this width with a vision tower of one layer, and a tokenizer."""
    tokenizer = build_tokenizer()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = Gemma3Config(text_config=_decoder(tokenizer, width), vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config), tokenizer


def t5_gemma(width: int) -> tuple[Any, Any]:
    """Returns a T5Gemma encoder of this width, and a tokenizer."""
    tokenizer = build_t5_tokenizer()
    sizes = T5GemmaModuleConfig(**_decoder(tokenizer, width))
    return T5GemmaEncoderModel(T5GemmaConfig(encoder=sizes, decoder=sizes, is_encoder_decoder=False)), tokenizer


def llama(width: int) -> tuple[Any, Any]:
    """Returns a Llama of this width, and a tokenizer."""
    tokenizer = build_tokenizer()
    return LlamaModel(LlamaConfig(**_decoder(tokenizer, width))), tokenizer


def _decoder(tokenizer: Any, width: int) -> dict[str, int]:
    """Returns the sizes of a language model of two layers, as most configs name them."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }


def picture_vae(channels: int) -> AutoencoderKL:
    """Returns an autoencoder of pictures with this many latent channels; a latent has 4 x 4 pixels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def wan_vae(channels: int) -> AutoencoderKLWan:
    """Returns Wan's autoencoder of videos; a latent has 4 frames of 8 x 8 pixels, the first one of 1 frame."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )
