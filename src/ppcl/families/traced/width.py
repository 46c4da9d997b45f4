"""Width surgery of a traced model: the feed-forward networks of its blocks become linear maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ppcl
from ppcl.artifacts.plan import Width
from ppcl.families.registry import pruned_name
from ppcl.families.traced.streams import tokens_of
from ppcl.families.traced.trace import Trace
from ppcl.families.width import Replacement, WidthSurgery
from ppcl.layers import Layout
from ppcl.surgery.share import share_pruned, skeleton


class TracedWidth(WidthSurgery):
    """Replaces each feed-forward network of a block by y = W x + b, where x is what the network is given.

    A block with several loses them together. There is no text stream to prune.
    """

    def __init__(self, trace: Trace) -> None:
        self._stacks = {stack.path: stack for stack in trace.stacks}
        self._model = trace.model

    @property
    def transformer_class(self) -> Any:  # type: ignore[override]
        return getattr(ppcl, pruned_name(self._model))

    def config(self, places: Width, layout: Layout) -> dict[str, Any]:
        return {
            "pruned_feed_forwards": {
                f"{stack}.{position}.{item.name}": item.dim
                for stack, sets in places.items()
                for position in sets["ffn"]
                for item in self._stacks[stack].feed_forwards
            }
        }

    def roles(
        self, stack: str, text: list[int], ffn: list[int], num_layers: int, layout: Layout
    ) -> list[dict[str, Any] | None]:
        return [{"stack": stack} if index in ffn else None for index in range(num_layers)]

    def prune(self, block: nn.Module, role: dict[str, Any], projectors: Mapping[str, Tensor]) -> nn.Module:
        pruned = skeleton(block)
        for item in self._stacks[role["stack"]].feed_forwards:
            owner, _, name = item.name.rpartition(".")
            with torch.device("meta"):
                setattr(pruned.get_submodule(owner), name, nn.Linear(item.dim, item.dim))
        return share_pruned(pruned, block, projectors)

    def replacements(self, stack: str, kind: str) -> dict[str, Replacement]:
        networks = self._stacks[stack].feed_forwards if kind == "ffn" else ()
        return {item.name.replace(".", ":"): Replacement(item.name, item.streams) for item in networks}

    def ffn_blocks(self, stack: str, blocks: Iterable[int]) -> list[int]:
        """Return those of `blocks` that are alike the one in which the trace found feed-forward networks."""
        found = self._stacks[stack]
        alike = range(found.first_block, found.blocks - found.last_blocks) if found.feed_forwards else ()
        return [index for index in blocks if index in alike]

    def inner_pairs(self, stack: str, block: nn.Module, kwargs: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

        def note(key: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
            given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            calls.setdefault(key, []).append((tokens_of(given), tokens_of(output)))

        with ExitStack() as hooks:
            for key, item in self.replacements(stack, "ffn").items():
                module = block.get_submodule(item.attribute)
                hooks.callback(module.register_forward_hook(partial(note, key), with_kwargs=True).remove)
            block.forward(**kwargs)  # not its own hooks, one of which has called this
        return {key: found[0] if len(found) == 1 else _joined(found) for key, found in calls.items()}


def _joined(calls: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the pairs of several calls as one, `[1, all tokens, D]`."""
    given, returned = zip(*calls, strict=True)
    return torch.cat([x.flatten(0, 1) for x in given])[None], torch.cat([y.flatten(0, 1) for y in returned])[None]
