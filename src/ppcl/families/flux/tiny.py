"""The embedded FLUX: every component has its real class and is small enough to train on two CPU cores.

As in `tiny_qwen_image`, only the transformer is trained. The text encoders keep their random weights, which is enough
to tell tokens and their order apart. For both tokenizers every word of the shapes world is one token.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from ppcl.data.worlds import shapes
from ppcl.models.autoencoder_pixel_unshuffle import AutoencoderPixelUnshuffle

HIDDEN_SIZE = 64
POOLED_SIZE = 32
MAX_LENGTH = 16  # the longest caption has nine words


def build_clip_tokenizer() -> CLIPTokenizer:
    """Return a byte-level BPE tokenizer with CLIP's `</w>`. Each word of the shapes world is one token."""
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.train_from_iterator(shapes.vocabulary(), trainer)
    model = json.loads(learner.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=MAX_LENGTH)


def build_t5_tokenizer() -> T5Tokenizer:
    """Return a unigram tokenizer that has the words of the shapes world, and single letters for all other words."""
    words = shapes.vocabulary()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -20.0)]
    pieces += [(f"\u2581{word}", -1.0) for word in words]
    pieces += [(letter, -20.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_LENGTH)


def build_pipeline(seed: int, num_layers: int = 10) -> Any:
    """Return an untrained tiny FLUX pipeline of `num_layers` dual-stream and twice as many single-stream blocks."""
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = build_clip_tokenizer(), build_t5_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=POOLED_SIZE,
            intermediate_size=2 * POOLED_SIZE,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2),
            d_model=HIDDEN_SIZE,
            d_kv=16,
            d_ff=2 * HIDDEN_SIZE,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    transformer = FluxTransformer2DModel(
        in_channels=48,
        num_layers=num_layers,
        num_single_layers=2 * num_layers,
        attention_head_dim=32,
        num_attention_heads=HIDDEN_SIZE // 32,
        joint_attention_dim=HIDDEN_SIZE,
        pooled_projection_dim=POOLED_SIZE,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
        vae=AutoencoderPixelUnshuffle(
            scaling_factor=2.0, shift_factor=shapes.BACKGROUND / 127.5 - 1.0, block_out_channels=(12, 12)
        ),
        text_encoder=text_encoder.eval().requires_grad_(False),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2.eval().requires_grad_(False),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
