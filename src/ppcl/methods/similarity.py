"""Similarity between the outputs of all pairs of blocks (paper Fig. 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from ppcl.data.batches import TrainingBatch
from ppcl.families.base import Family
from ppcl.ops.cka import centre
from ppcl.taps import BlockCall, observe

MAP_TOKENS = 256


@torch.no_grad()
def similarity_maps(
    family: Family, transformer: torch.nn.Module, batch: TrainingBatch, *, top_channels: int = 0
) -> dict[str, list[list[float | None]]]:
    """Return per stream the CKA between the outputs of all pairs of blocks (paper Fig. 5), averaged over the batch.

    Rows and columns are the blocks of all stacks in order of execution, None where a block does not output the stream.
    At most `MAP_TOKENS` evenly spaced tokens are used, because the Gram matrices of all blocks are in memory at once.

    `top_channels`: how many channels of each block to leave out, those of the most variance. A few very large ones can
    make different blocks look alike.
    """
    masks = family.masks(batch.inputs)
    grams: dict[str, dict[int, Tensor]] = {}
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
            unit = gram / gram.square().sum(dim=(1, 2), keepdim=True).sqrt()
            grams.setdefault(stream, {})[places[call.key]] = unit.flatten(1).float()

    observe(family, transformer, batch.inputs, on_block)
    maps: dict[str, list[list[float | None]]] = {}
    for stream, units in grams.items():
        stacked = torch.stack([*units.values()], dim=1)  # [B, M, N * N]
        found = (stacked @ stacked.mT).mean(dim=0).tolist()
        rows = dict(zip(units, (dict(zip(units, row, strict=True)) for row in found), strict=True))
        maps[stream] = [[rows.get(i, {}).get(j) for j in places.values()] for i in places.values()]
    return maps
