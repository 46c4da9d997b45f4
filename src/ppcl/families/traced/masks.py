"""Finds the masks of streams: the inputs of a forward that mark which tokens of a stream are padding."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.families.traced.calls import Call, record
from ppcl.families.traced.leaves import Path, at, same, tensors
from ppcl.families.traced.streams import Stream, tokens_of
from ppcl.streaming import still
from ppcl.taps import stack_of


def find_masks(
    transformer: nn.Module, streams: Sequence[Stream], call: Call, inputs: Mapping[str, Any]
) -> dict[str, str]:
    """Return for streams of a block the argument of the forward that marks their padding, by the streams' names.

    A mask is boolean or of 0 and 1, shaped `[B, tokens]` like the stream. If it has the shape of several streams, it is
    that of the longest name that is part of its own. No valid token may depend on what it marks: with as many tokens of
    text as of the picture, a mask of the text has the picture's shape, too. Valid tokens must depend on what another
    integer marks: segments are told apart by any two integers.
    """
    found: dict[str, str] = {}
    for stream, name in _by_shape(streams, call, inputs):
        if stream in found:
            continue
        its_own, mask = next(each for each in streams if each.name == stream), inputs[name]
        padded: Call | None = call
        if mask.all() or not mask.any():
            mask = torch.ones_like(mask)
            mask[:, -1] = 0
            padded = _called_with(transformer, call, {**inputs, name: mask})
        if padded is None or not _is_padding(transformer, padded, its_own, mask == 0):
            continue
        if mask.dtype != torch.bool:
            other = _called_with(transformer, call, {**inputs, name: torch.where(mask == 0, 2, mask)})
            if other is not None and _is_padding(transformer, other, its_own, mask == 0):
                continue
        found[stream] = name
    return found


def _called_with(transformer: nn.Module, call: Call, inputs: Mapping[str, Any]) -> Call | None:
    """Return the call of the same block in a forward on other inputs; None if the model does not run on them."""
    try:
        return record(transformer, inputs, [call.key[0]]).of(call.key)
    except Exception:  # whatever a model raises that is given no such mask
        return None


def _by_shape(streams: Sequence[Stream], call: Call, inputs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return streams of a block with each input that has the shape of a mask of theirs, and the name."""
    shapes = {}
    for stream in streams:
        shapes[stream.name] = tokens_of(tensors(call.arguments)[stream.argument]).shape[:2]
    found: list[tuple[str, str]] = []
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.ndim != 2 or not _marks(value):
            continue
        fitting = [stream for stream, shape in shapes.items() if shape == value.shape and shape[1] > 1]
        if len(fitting) > 1:
            named = [stream for stream in fitting if stream in name]
            # `encoder_attention_mask` goes with `encoder_hidden_states`.
            named = named or [stream for stream in fitting if stream.partition("_")[0] == name.partition("_")[0]]
            fitting = sorted(named, key=len)[-1:]
        found += [(stream, name) for stream in fitting]
    return found


def _marks(value: Tensor) -> bool:
    """Return whether a tensor holds nothing but 0 and 1, or false and true."""
    if value.dtype == torch.bool:
        return True
    return bool(((value == 0) | (value == 1)).all())


@torch.no_grad()
def _is_padding(transformer: nn.Module, call: Call, stream: Stream, padding: Tensor) -> bool:
    """Return whether a block computes the same for all other tokens of a stream when those of `padding` change.

    With the gates of an untrained model, which are 0, no token depends on another: they are opened.
    """
    source, given = stack_of(transformer, call.key[0])[call.key[1]], at(call.arguments, stream.argument)
    with still(source):
        block = copy.deepcopy(source)
    for parameter in block.parameters():
        if not parameter.any():
            parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
    changed = torch.where(padding[..., None], -1 - tokens_of(given), tokens_of(given)).view_as(given)
    outputs = [block(**arguments) for arguments in (call.arguments, _with(call.arguments, stream.argument, changed))]
    before, after = (tokens_of(at(output, stream.slot))[~padding] for output in outputs)
    return same(before, after)


def _with(value: Any, place: Path, new: Tensor) -> Any:
    """Return nested arguments with another tensor at a place."""
    if not place:
        return new
    key, rest = place[0], place[1:]
    if isinstance(value, Mapping):
        return {**value, key: _with(value[key], rest, new)}
    return type(value)(_with(item, rest, new) if number == key else item for number, item in enumerate(value))
