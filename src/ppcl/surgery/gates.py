"""Gates on the blocks of a transformer, which let each sample pass through a block or around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.taps import BlockCall, BlockKey, Tapped, hooked


@contextmanager
def gated(
    family: Tapped, transformer: nn.Module, inputs: Mapping[str, Any], gates: Mapping[BlockKey, Tensor]
) -> Iterator[None]:
    """Give blocks the output gate * block(x) + (1 - gate) * x within the context, for every stream that they carry.

    `inputs`: the keyword arguments of the forward that runs in the context. `gates`: a number `[B]` for each sample, by
    block. A block without a gate, and a stream that ends in a block, stay as they are. A gate of 1 is the block to the
    bit, and a gate of 0 is the model without the block.

    A backward pass with gradient checkpointing calls the blocks again, and has to run in the context, too.
    """

    def mixed(call: BlockCall) -> Any:
        gate = gates.get(call.key)
        return None if gate is None else _mixed(call, gate)

    with hooked(family, transformer, lambda: inputs, mixed):
        yield


def _mixed(call: BlockCall, gate: Tensor) -> Any:
    """Return the output of a call in which each tensor that holds streams is mixed with what the block was given."""

    def part(item: Any) -> Any:
        given = _given(call, item)
        if given is None:
            return item
        weight = gate.to(item.dtype).view(-1, *[1] * (item.ndim - 1))
        return torch.lerp(given.to(item.dtype), item, weight)  # exact at 0 and at 1

    return type(call.output)(map(part, call.output)) if isinstance(call.output, (tuple, list)) else part(call.output)


def _given(call: BlockCall, item: Any) -> Tensor | None:
    """Return the input of a block that stands for the part `item` of its output; None if `item` holds no stream.

    It is a stream itself, or one tensor in which a family joins the streams.
    """
    for name, stream in call.outputs.items():
        if stream is item:
            return call.inputs.get(name)
    if not isinstance(item, Tensor) or not any(_overlap(item, stream) for stream in call.outputs.values()):
        return None
    alike = (value for value in call.kwargs.values() if isinstance(value, Tensor) and value.shape == item.shape)
    return next((value for value in alike if any(_overlap(value, each) for each in call.inputs.values())), None)


def _overlap(whole: Tensor, part: Tensor) -> bool:
    return whole.untyped_storage()._cdata == part.untyped_storage()._cdata  # has no data in a dry run
