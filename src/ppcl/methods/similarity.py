"""Similarity between the outputs of all pairs of blocks: by CKA (paper Fig. 5), and by the cosine of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ppcl.data.batches import TrainingBatch
from ppcl.families.base import Family
from ppcl.ops.cka import centre
from ppcl.taps import BlockCall, observe, stack_of

MAP_TOKENS = 256


def similarity_maps(
    family: Family, transformer: torch.nn.Module, batch: TrainingBatch, *, top_channels: int = 0
) -> dict[str, list[list[float | None]]]:
    """Return per stream the CKA between the outputs of all pairs of blocks (paper Fig. 5), averaged over the batch.

    Rows and columns are the blocks of all stacks in order of execution, None where a block does not output the stream.
    At most `MAP_TOKENS` evenly spaced tokens are used, because the Gram matrices of all blocks are in memory at once.

    `top_channels`: how many channels of each block to leave out, those of the most variance. A few very large ones can
    make different blocks look alike.
    """
    maps: dict[str, list[list[float | None]]] = {}
    for stream, grams in unit_grams(family, transformer, batch, top_channels=top_channels).items():
        rows = (grams @ grams.mT).mean(dim=0).tolist()
        there = [row[place] > 0 for place, row in enumerate(rows)]
        maps[stream] = [
            [value if one and other else None for other, value in zip(there, row, strict=True)]
            for one, row in zip(there, rows, strict=True)
        ]
    return maps


@torch.no_grad()
def unit_grams(
    family: Family, transformer: torch.nn.Module, batch: TrainingBatch, *, top_channels: int = 0
) -> dict[str, Tensor]:
    """Return per stream the Gram matrices of all blocks' outputs, scaled to norm 1, `[B, blocks, N * N]` of N tokens.

    They are zero where a block does not output the stream.
    """
    masks = family.masks(batch.inputs)
    grams: dict[str, Tensor] = {}
    places = {key: place for place, key in enumerate(family.blocks(transformer))}

    def on_block(call: BlockCall) -> None:
        for stream, features in call.outputs.items():
            every = -(-features.shape[1] // MAP_TOKENS)
            mask = masks[stream]
            centred = centre(features[:, ::every].double(), None if mask is None else mask[:, ::every])
            if top_channels:
                variance = centred.square().sum(dim=(0, 1))
                centred = centred[..., variance.argsort()[: len(variance) - top_channels]]
            gram = centred @ centred.mT  # [B, N, N]
            unit = (gram / gram.square().sum(dim=(1, 2), keepdim=True).sqrt()).flatten(1)
            if stream not in grams:
                grams[stream] = unit.new_zeros(len(unit), len(places), unit.shape[1], dtype=torch.float32)
            grams[stream][:, places[call.key]] = unit

    observe(family, transformer, batch.inputs, on_block)
    return grams


@torch.no_grad()
def state_cosines(family: Family, transformer: torch.nn.Module, batch: TrainingBatch) -> dict[tuple[str, str], Tensor]:
    """Return by stack and stream the cosines between all states, summed over valid tokens, and the tokens' number.

    State i of a stack of M blocks is the input of block i, state M is the output of the last block. The result is
    `[2, M + 1, M + 1]`: the sums and, in float64 like them, the numbers, which are 0 where a state lacks the stream.

    At most `MAP_TOKENS` evenly spaced tokens of a sample are used, because all states are in memory at once.
    """
    masks = family.masks(batch.inputs)
    counts = {stack: len(stack_of(transformer, stack)) for stack in family.stacks}
    units: dict[tuple[str, str], Tensor] = {}
    there: dict[tuple[str, str], Tensor] = {}

    def note(stack: str, place: int, stream: str, features: Tensor) -> None:
        every = -(-features.shape[1] // MAP_TOKENS)
        unit = normalize(features[:, ::every].float(), dim=-1)
        if (mask := masks[stream]) is not None:
            unit = unit * mask[:, ::every].unsqueeze(-1)
        if (stack, stream) not in units:
            units[stack, stream] = unit.new_zeros(counts[stack] + 1, unit.numel())
            there[stack, stream] = unit.new_zeros(counts[stack] + 1, dtype=torch.float64)
        units[stack, stream][place] = unit.flatten()
        there[stack, stream][place] = unit.shape[:2].numel() if mask is None else mask[:, ::every].sum()

    def on_block(call: BlockCall) -> None:
        for stream, features in call.inputs.items():
            note(call.stack, call.index, stream, features)
        if call.index == counts[call.stack] - 1:
            for stream, features in call.outputs.items():
                note(call.stack, call.index + 1, stream, features)

    observe(family, transformer, batch.inputs, on_block)
    return {
        key: torch.stack([(unit @ unit.mT).double(), torch.minimum(there[key], there[key].unsqueeze(-1))])
        for key, unit in units.items()
    }
