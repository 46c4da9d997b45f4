"""Language models as text encoders of the tiny pipelines, with random weights, and their tokenizer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from ppcl.families.qwen_image.tiny import build_tokenizer
from ppcl.models.processing_pictures import PictureProcessor

WIDTH = 40  # of text encoders
# Messages are texts, or lists of parts of which each has a text.
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)


def chat_tokenizer(*special_tokens: str) -> Qwen2Tokenizer:
    """Return a tokenizer that has the words of the shapes world, and a chat template."""
    tokenizer = build_tokenizer()
    if special_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special_tokens)})
    tokenizer.chat_template = _CHAT
    return tokenizer


def _vocabulary(tokenizer: Any) -> int:
    return -(-len(tokenizer) // 8) * 8


def qwen3(tokenizer: Any) -> nn.Module:
    """Return a Qwen3 of three layers."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=_vocabulary(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
        )
    )


def qwen3_vl(tokenizer: Any) -> Any:
    """Return a Qwen3-VL of three layers, with a vision tower of one."""
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={
                "vocab_size": _vocabulary(tokenizer),
                "hidden_size": WIDTH,
                "intermediate_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": WIDTH,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
            video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        )
    )


def qwen3_vl_processor() -> Any:
    """Return a processor of pictures and texts, without that of videos, which needs torchvision."""
    tokenizer = chat_tokenizer("<|vision_start|>", "<|vision_end|>")
    return PictureProcessor(Qwen2VLImageProcessorPil(), tokenizer, chat_template=tokenizer.chat_template)


def gemma2(tokenizer: Any) -> nn.Module:
    """Return a Gemma 2 of two layers."""
    return Gemma2Model(
        Gemma2Config(
            vocab_size=_vocabulary(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
        )
    )
