"""Least-squares rounding of a whole model: block after block, each on what the rounded blocks before it give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.data.batches import TrainingBatch
from ppcl.export.quantized import BITS, torchao_tensor
from ppcl.families.base import Family
from ppcl.ops.rounding import InputMoments, best_weight, damped, round_least_squares, spanning_grid
from ppcl.taps import BlockCall, BlockKey, Streams, inputs_of, observe


@dataclass
class _Flow:
    """A batch on its way through a model, between two blocks: what the next one is called with.

    `calls` and `slots` hold, for every block, its arguments but for the streams, and the names of those.
    """

    masks: dict[str, Tensor | None]
    calls: dict[BlockKey, dict[str, Any]]
    slots: dict[BlockKey, dict[str, str]]
    streams: Streams

    @classmethod
    def into(cls, family: Family, model: nn.Module, batch: TrainingBatch) -> _Flow:
        """In front of the first block."""
        flow = cls(family.masks(batch.inputs), {}, {}, {})

        def keep(call: BlockCall) -> None:
            flow.streams = flow.streams or call.inputs
            slots = {
                name: key for name, value in call.inputs.items() for key in call.kwargs if call.kwargs[key] is value
            }
            flow.slots[call.key] = slots
            flow.calls[call.key] = {key: value for key, value in call.kwargs.items() if key not in slots.values()}

        observe(family, model, batch.inputs, keep)
        return flow

    def arguments(self, key: BlockKey) -> dict[str, Any]:
        return self.calls[key] | {slot: self.streams[name] for name, slot in self.slots[key].items()}

    def advance(self, family: Family, key: BlockKey, block: nn.Module) -> None:
        self.streams = family.streams_out(key[0], block(**self.arguments(key)))

    def rows(self, family: Family, name: str, inputs: Tensor) -> Tensor:
        """The valid ones of a linear layer's inputs, `[samples, dim_in]`; of text no padding."""
        mask = self.masks.get(family.stream_of(name)) if inputs.dim() == 3 else None
        return inputs.flatten(0, -2) if mask is None else inputs[mask]


def _sharing_inputs(inputs: dict[str, Tensor]) -> list[list[str]]:
    """Names in order of execution, those together that read the very same tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in inputs.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


@torch.no_grad()
def round_blocks(
    family: Family,
    given: nn.Module,
    batches: Sequence[TrainingBatch],
    chosen: Iterable[str],
    round_layer: Callable[[nn.Linear, InputMoments], None],
    *,
    prepare: Callable[[], None] = lambda: None,
    each_block: Callable[[Iterable[tuple[BlockKey, nn.Module]]], Iterable[tuple[BlockKey, nn.Module]]] = lambda it: it,
) -> None:
    """Call `round_layer` with every layer of the blocks of `given` that `chosen` names, in order of execution.

    With it go the moments of its inputs in the model as it was and in the model as far as it is rounded. Layers that
    read the same tensor share them; a layer that no block calls is handed empty ones. `prepare` is called in between,
    to round what lies outside of the blocks: only one block is held twice at a time.
    """
    flows = [_Flow.into(family, given, batch) for batch in batches]
    prepare()
    rounded = [_Flow.into(family, given, batch) for batch in batches]
    for key, block in each_block(list(family.blocks(given).items())):
        prefix = f"{key[0]}.{key[1]}."
        names = [name.removeprefix(prefix) for name in chosen if name.startswith(prefix)]
        original = copy.deepcopy(block)
        reached = inputs_of(original, names, flows[0].arguments(key)) if names else {}
        for group in _sharing_inputs(reached):
            moments: InputMoments | None = None
            for flow, now in zip(flows, rounded, strict=True):
                x, x_rounded = (
                    found.rows(family, group[0], inputs_of(part, group[:1], found.arguments(key))[group[0]])
                    for found, part in ((flow, original), (now, block))
                )
                moments = moments or InputMoments(x.shape[1], x.device)
                moments.add(x_rounded, x)
            assert moments is not None, "there is at least one batch"
            for name in group:
                round_layer(_linear(block, name), moments)
        for name in names:
            if name not in reached:
                linear = _linear(block, name)
                round_layer(linear, InputMoments(linear.in_features, linear.weight.device))
        for flow, now in zip(flows, rounded, strict=True):
            flow.advance(family, key, original)
            now.advance(family, key, block)


def _linear(block: nn.Module, name: str) -> nn.Linear:
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


@torch.no_grad()
def round_linear(linear: nn.Linear, moments: InputMoments, scheme: str, group_size: int | None, damping: float) -> None:
    """Round a layer to what gives most nearly the outputs it had, with a bias, where it has one, that fits."""
    dtype, weight = linear.weight.dtype, linear.weight.double()
    own_bias = linear.bias is not None and moments.count > 0
    gram, cross = moments.centred() if own_bias else (moments.gram, moments.cross)
    target = best_weight(weight, gram, cross, damping)
    int8 = scheme == "int8"  # torchao keeps its scales in float32 whatever the model's dtype
    grid = spanning_grid(
        target, group_size or linear.in_features, BITS[scheme], torch.float32 if int8 else dtype, symmetric=int8
    )
    ints, grid = round_least_squares(target, damped(gram, damping), grid)
    if own_bias:
        lost = weight @ moments.sum_given - grid.values(ints) @ moments.sum_rounded
        linear.bias = nn.Parameter((linear.bias.double() + lost / moments.count).to(dtype), requires_grad=False)
    linear.weight = nn.Parameter(torchao_tensor(ints, grid, dtype), requires_grad=False)
