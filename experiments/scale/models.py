"""Make Qwen-Image transformers of any size with random weights, and batches for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel

from ppcl.artifacts.plan import Interval
from ppcl.data.batches import TrainingBatch
from ppcl.families.registry import get_family

STACK = "transformer_blocks"
CHANNELS, TEXT_WIDTH, HEAD = 64, 256, 64


@dataclass(frozen=True)
class Size:
    """The size of a model and its batches.

    The model has `heads` heads of 64 channels each. A sample has `side` x `side` image tokens and `text` prompt tokens,
    and a batch has `batch` samples.
    """

    num_layers: int = 20
    heads: int = 8
    side: int = 20
    text: int = 64
    batch: int = 2

    @property
    def width(self) -> int:
        return HEAD * self.heads

    @property
    def tokens(self) -> int:
        return self.batch * (self.side**2 + self.text)


# Like those that detection finds on the embedded teacher, but for the last one, which ends a block earlier. They cover
# 16 of 20 blocks and remove nine.
INTERVALS: list[Interval] = [(0, 1), (3, 5), (6, 7), (9, 11), (13, 14), (15, 16), (17, 18)]
TINY = Size(num_layers=9, heads=1, side=6, text=8)
TINY_INTERVALS: list[Interval] = [(0, 1), (3, 5), (6, 7)]


def make_teacher(size: Size, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Return a frozen Qwen-Image transformer with random weights."""
    torch.manual_seed(seed)
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS // 4,
        num_layers=size.num_layers,
        attention_head_dim=HEAD,
        num_attention_heads=size.heads,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(16, 24, 24),
    )
    return model.to(dtype).eval().requires_grad_(False)


def make_batch(size: Size, dtype: torch.dtype = torch.float32, seed: int = 0) -> TrainingBatch:
    """Return a random batch whose prompts all have the same length, without padding."""
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, size.batch, size.side**2, CHANNELS, generator=generator).to(dtype)
    conditions = {
        "prompt_embeds": torch.randn(size.batch, size.text, TEXT_WIDTH, generator=generator).to(dtype),
        "prompt_embeds_mask": torch.ones(size.batch, size.text, dtype=torch.bool),
    }
    sigmas = torch.rand(size.batch, generator=generator).to(dtype)
    return get_family("qwen_image").training_batch(latents, conditions, noise, sigmas, (size.side, size.side))
