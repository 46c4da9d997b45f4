"""Width surgery of a family: text streams and FFNs of its blocks become linear projectors (paper Eq. 8-9)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ppcl.artifacts.plan import Width
from ppcl.families.pruning import packed_text
from ppcl.layers import Layout


class Replacement(NamedTuple):
    """A projector of a pruned block.

    `attribute`: the path of the module within the block. `streams`: the streams of the block's output that it serves.
    """

    attribute: str
    streams: tuple[str, ...]


class WidthSurgery(ABC):
    """Makes width-pruned blocks from a family's stock blocks.

    `transformer_class` is a subclass of the family's diffusers class whose config names the pruned blocks.
    `projectors` names the attributes of a pruned block that hold its projectors: `text_in` (the paper's l_z),
    `text_out` (l_h), `image_ffn` and `text_ffn`. A family leaves out those that it does not have.
    """

    transformer_class: Any
    projectors: dict[str, str]

    @abstractmethod
    def config(self, places: Width, layout: Layout) -> dict[str, Any]:
        """Return the config entries of `transformer_class` that name the pruned blocks.

        `places` holds their positions among the kept blocks, not their indices in the teacher.
        """

    @abstractmethod
    def roles(
        self, stack: str, text: list[int], ffn: list[int], num_layers: int, layout: Layout
    ) -> list[dict[str, Any] | None]:
        """Return the keyword arguments of the pruned block class for each of a stack's `num_layers` blocks.

        `text` and `ffn` are the positions that lose their text stream and their FFN. An entry is None where the stock
        block stays.
        """

    @abstractmethod
    def prune(self, block: nn.Module, role: dict[str, Any], projectors: Mapping[str, Tensor]) -> nn.Module:
        """Return a pruned block that shares the parameters it keeps with `block`.

        `role` is an entry of `roles`. `projectors` is a state dict; projectors missing in it start as the identity.
        """

    def replacements(self, stack: str, kind: str) -> dict[str, Replacement]:
        """Return the projectors of a block of `stack` that loses its `text` stream or its `ffn`, by their keys."""
        streams = (
            {"text_in": "text", "text_out": "text"} if kind == "text" else {"image_ffn": "image", "text_ffn": "text"}
        )
        known = self.projectors
        return {key: Replacement(known[key], (stream,)) for key, stream in streams.items() if key in known}

    def ffn_blocks(self, stack: str, blocks: Iterable[int]) -> list[int]:
        """Return those of `blocks` of a stack of the teacher whose FFN can be replaced: by default all."""
        return list(blocks)

    def inner_pairs(
        self, stack: str, block: nn.Module, kwargs: dict[str, Any]
    ) -> dict[str, tuple[Tensor, Tensor]] | None:
        """Return what each FFN within `block` is given and returns in a call, `[B, tokens, D]`, by its projector's key.

        By default None: FFN projectors are `ResidualLinear`, and take the state after attention to the block's output.
        """
        return None

    def text_qkv_input(self, block: nn.Module, kwargs: dict[str, Any]) -> Tensor:
        """Return z `[B, L, D]`, the normed and modulated text that goes into the QKV projections of `block` (Eq. 8).

        `kwargs` are the keyword arguments of the block's call.
        """
        raise AssertionError("a family without text stacks has no such input")

    def with_text(self, kwargs: dict[str, Any], text: Tensor, reference: Tensor) -> dict[str, Any]:
        """Return the keyword arguments of a block's call with the text that a text-pruned block reads.

        `text` is the text output h, `reference` the z of the reference block, each `[B, L, D]`.
        """
        return kwargs | {"encoder_hidden_states": packed_text(text, reference)}


DUAL_STREAM_PROJECTORS = {
    "text_in": "txt_proj",
    "text_out": "ehs_proj",
    "image_ffn": "img_ffn_proj",
    "text_ffn": "txt_ffn_proj",
}
