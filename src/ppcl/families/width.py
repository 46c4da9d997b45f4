"""Width surgery of a family: how its blocks lose text streams and FFNs to linear projectors (paper Eq. 8-9)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ppcl.artifacts.plan import Width
from ppcl.families.pruning import packed_text
from ppcl.layers import Layout


class WidthSurgery(ABC):
    """Makes pruned blocks of a family's own.

    `transformer_class` is the family's diffusers class with width sets in its config. `projectors` names the attributes
    of a pruned block that hold `text_in` (l_z), `text_out` (l_h), `image_ffn` and `text_ffn`, as far as it has them.
    """

    transformer_class: Any
    projectors: dict[str, str]

    @abstractmethod
    def config(self, places: Width, layout: Layout) -> dict[str, Any]:
        """Config entries of `transformer_class` for blocks pruned at these positions among those kept."""

    @abstractmethod
    def roles(
        self, stack: str, text: list[int], ffn: list[int], num_layers: int, layout: Layout
    ) -> list[dict[str, Any] | None]:
        """The role of each of a stack's `num_layers` blocks if those at `text` and `ffn` are pruned; None for none."""

    @abstractmethod
    def prune(self, block: nn.Module, role: dict[str, Any], projectors: Mapping[str, Tensor]) -> nn.Module:
        """A block with `role` that shares what it keeps with `block`; absent projectors are the identity."""

    def text_qkv_input(self, block: nn.Module, kwargs: dict[str, Any]) -> Tensor:
        """z `[B, L, D]`: the modulated, normed text that goes into a block's QKV."""
        raise AssertionError("a family without text stacks has no such input")

    def with_text(self, kwargs: dict[str, Any], text: Tensor, reference: Tensor) -> dict[str, Any]:
        """A block's arguments with the text `[B, L, D]` and the reference's z `[B, L, D]` a pruned block reads."""
        return kwargs | {"encoder_hidden_states": packed_text(text, reference)}


DUAL_STREAM_PROJECTORS = {
    "text_in": "txt_proj",
    "text_out": "ehs_proj",
    "image_ffn": "img_ffn_proj",
    "text_ffn": "txt_ffn_proj",
}
