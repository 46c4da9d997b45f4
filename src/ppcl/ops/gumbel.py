"""Random choices that gradients pass through: the straight-through Gumbel-softmax."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def gumbel_noise(count: int, options: int, generator: torch.Generator) -> Float[Tensor, "count options"]:
    """Return Gumbel noise, drawn on the CPU. The option with the largest logit + noise is drawn as softmax says."""
    uniform = torch.rand(count, options, generator=generator, dtype=torch.float32)
    return -(-uniform.clamp(min=1e-12).log()).log()


def straight_through(
    logits: Float[Tensor, " options"], noise: Float[Tensor, "count options"], tau: float
) -> Float[Tensor, "count options"]:
    """Return one choice per row of `noise`: exactly 1 at the option that is drawn, and 0 at all others.

    Its gradient is that of softmax((logits + noise) / tau).
    """
    soft = ((logits + noise) / tau).softmax(dim=-1)
    hard = torch.zeros_like(soft).scatter(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())  # the bracket is exactly zero
