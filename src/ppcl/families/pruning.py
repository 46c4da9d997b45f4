"""Parts that the width-pruned models of all families share; an export carries them within its model's file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ResidualLinear(nn.Linear):
    """x + W x + b, which starts as the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def width_roles(
    num_layers: int, pruned_text: list[int], pruned_ffn: list[int], text_output: str, keep_text_query: bool
) -> list[dict[str, bool] | None]:
    """Keyword arguments of a pruned dual-stream block, per block of a stack; None where the stock block stays.

    `text_output`: `last`, one ehs_proj at the end of a run of text-pruned blocks, or `each` block its own.
    """
    text, ffn = set(pruned_text), set(pruned_ffn)
    roles: list[dict[str, bool] | None] = []
    for index in range(num_layers):
        carry = index + 1 in text
        role = {
            "project_text": index in text,
            "project_text_output": index in text and (text_output == "each" or not carry),
            "project_ffn": index in ffn,
            "carry": carry,
        }
        any_role = any(role.values())
        role["keep_text_query"] = keep_text_query and index in text
        roles.append(role if any_role else None)
    return roles


def packed_text(text: Tensor, reference: Tensor) -> Tensor:
    """`[2, B, L, D]` = (text output h, modulated text z of the reference): what carrying blocks hand on as text.

    The two lie along a dimension of their own, before the others: FirstBlockCache takes the first block's text from
    the last one's, which is `[B, L, D]`, and adds the difference to the first one's again.
    """
    return torch.stack([text, reference])


def unpacked_text(encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """The text output h and the reference's z, `[B, L, D]` each, that a text-pruned block was handed."""
    if encoder_hidden_states.dim() != 4:
        raise ValueError(
            "this block has no text stream of its own: it reads what an earlier block of its run made of the text, "
            "which a block before it has not handed on. A text-pruned block, and the one before it, cannot be skipped."
        )
    text, reference = encoder_hidden_states
    return text, reference


def register_blocks(stock_of: dict[type, type], image_processor: type | None = None) -> None:
    """Make pruned blocks known to diffusers' caches and layer skipping, as what the stock blocks are to them.

    `image_processor` is an attention processor that returns the image alone. diffusers keeps such classes in a private
    module: a version without it, or with another one, loads the model all the same, and has no caches for it.
    """
    try:
        from diffusers.hooks import _helpers as helpers

        for block, stock in stock_of.items():
            known = helpers.TransformerBlockRegistry.get(stock)
            order: dict[str, Any] = {
                name: getattr(known, name)
                for name in ("return_hidden_states_index", "return_encoder_hidden_states_index")
            }
            helpers.TransformerBlockRegistry.register(block, helpers.TransformerBlockMetadata(**order))
        if image_processor is not None:
            skipped = helpers.AttentionProcessorMetadata(lambda attn, *args, **kwargs: kwargs["hidden_states"])
            helpers.AttentionProcessorRegistry.register(image_processor, skipped)
    except Exception:  # whatever has become of it
        return
