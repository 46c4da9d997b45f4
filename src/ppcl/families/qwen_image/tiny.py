"""The embedded Qwen-Image: every component has its real class and is small enough to train on two CPU cores.

This module builds the pipeline untrained; `stages=[pretrain]` trains its transformer. By default the text encoder keeps
its random weights: a random causal transformer tells tokens and their order apart, which is enough for a vocabulary
of some thirty words. With `pretrain.text_encoder_lr` it is trained too.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from ppcl.data.worlds import shapes
from ppcl.models.autoencoder_pixel_unshuffle import AutoencoderPixelUnshuffle

HIDDEN_SIZE = 64
# Words of the template that the pipeline wraps around a prompt. The pipeline drops the first 34 tokens of the result,
# so every word of the template must be one token.
_TEMPLATE_WORDS = (
    "system Describe the image by detailing color shape size texture quantity text spatial "
    "relationships of objects and background user assistant a photo"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"]


def build_tokenizer(words: Collection[str] = (), special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Qwen2Tokenizer:
    """Return a byte-level BPE tokenizer in which each of `words` is one token.

    By default these are the words of the template and of the shapes world.
    """
    known = sorted({*words} or {*_TEMPLATE_WORDS.split(), *shapes.vocabulary()})
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    learner.train_from_iterator([form for word in known for form in (word, f" {word}")], trainer)
    model = json.loads(learner.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special_tokens[1:])})
    return tokenizer


def build_text_encoder(
    tokenizer: Qwen2Tokenizer, vision_tokens: Sequence[str] = ("<|im_start|>", "<|im_end|>")
) -> Qwen2_5_VLForConditionalGeneration:
    """Return a two-layer Qwen2.5-VL with random weights.

    `vision_tokens` mark the start and the end of a picture in a prompt. Prompts of this family have no pictures, so the
    default is any two special tokens.
    """
    tokens = (*SPECIAL_TOKENS, *vision_tokens)
    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 8) * 8,
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 2 * HIDDEN_SIZE,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": HIDDEN_SIZE,
            "fullatt_block_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids[vision_tokens[0]],
        vision_end_token_id=ids[vision_tokens[1]],
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)


def build_pipeline(seed: int, num_layers: int = 20, categories: Sequence[str] = shapes.CATEGORIES) -> Any:
    """Return an untrained tiny Qwen-Image pipeline. The same arguments give the same weights.

    Its tokenizer has the words of `categories`.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer({*_TEMPLATE_WORDS.split(), *shapes.vocabulary(categories)})
    text_encoder = build_text_encoder(tokenizer)
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
        vae=build_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=build_transformer(num_layers),
    )


def build_vae(cell: int = 1) -> AutoencoderPixelUnshuffle:
    """Return a VAE whose latents are zero for the background colour. For `cell` see `AutoencoderPixelUnshuffle`."""
    mean = (shapes.BACKGROUND / 127.5 - 1.0,) * 12
    return AutoencoderPixelUnshuffle(latents_mean=mean, latents_std=(0.5,) * 12, cell=cell)


def build_transformer(num_layers: int, **arch: Any) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=48,
        out_channels=12,
        num_layers=num_layers,
        attention_head_dim=32,
        num_attention_heads=HIDDEN_SIZE // 32,
        joint_attention_dim=HIDDEN_SIZE,
        axes_dims_rope=(8, 12, 12),
        **arch,
    )
