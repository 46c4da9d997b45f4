"""Parts that the width-pruned models of all families share. An export pastes them into its model's file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ResidualLinear(nn.Linear):
    """The residual linear map x + W x + b on `[..., dim]`. W and b start at zero, so it starts as the identity."""

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
    """Return the keyword arguments of the pruned block class for every block of a dual-stream stack.

    An entry is None where the stock block stays. `pruned_text` and `pruned_ffn` are positions in this stack.
    `text_output`: `last` gives an output projector (`ehs_proj`, the paper's l_h) to the last block of each run of
    adjacent text-pruned blocks; `each` gives one to every text-pruned block.
    `keep_text_query`: keep the text's query projections, which no output depends on.
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
    """Stack the text output h and the reference block's modulated text z, each `[B, L, D]`, to `[2, B, L, D]`.

    A block before a text-pruned one returns this in place of its text. The new dimension comes first because diffusers'
    FirstBlockCache subtracts the first block's text from the last block's, which is `[B, L, D]`, and later adds the
    difference to the first block's text: so the two shapes broadcast.
    """
    return torch.stack([text, reference])


def unpacked_text(encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the text output h and the reference block's z, each `[B, L, D]`, from the text that a block was given.

    Raises `ValueError` if the previous block did not pack them.
    """
    if encoder_hidden_states.dim() != 4:
        raise ValueError(
            "this block has no text stream of its own: it needs the text of an earlier block, which the block before "
            "did not pass on. A text-pruned block, and the one before it, cannot be skipped."
        )
    text, reference = encoder_hidden_states
    return text, reference


def register_blocks(stock_of: dict[type, type], image_processor: type | None = None) -> None:
    """Register pruned block classes with diffusers' caching and layer skipping.

    `stock_of` maps a pruned class to the stock class whose entry it gets. `image_processor` is the class of an
    attention processor that returns the image stream alone. diffusers keeps these registries in a private module. With
    a version that has changed it, the model still loads, but cannot be cached.
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
    except Exception:  # a private module can change in any way
        return
