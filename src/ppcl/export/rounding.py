"""Least-squares rounding of a model, block by block: each block gets the outputs of the rounded blocks before it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.data.batches import TrainingBatch
from ppcl.errors import UsageError
from ppcl.export.quantized import BITS, torchao_tensor
from ppcl.families.base import Family
from ppcl.ops.rounding import InputMoments, best_weight, damped, round_least_squares, spanning_grid
from ppcl.taps import BlockCall, BlockKey, Streams, inputs_of, observe

Blocks = Iterable[tuple[BlockKey, nn.Module]]


@dataclass
class _Flow:
    """A batch part way through a model: the arguments of the next block's call.

    `calls` holds the keyword arguments of every block except its streams. `slots` holds, for every block, the name of
    the argument that each stream is passed as. `streams` are the inputs of the next block.
    """

    inputs: dict[str, Any]
    masks: dict[str, Tensor | None]
    calls: dict[BlockKey, dict[str, Any]]
    slots: dict[BlockKey, dict[str, str]]
    streams: Streams

    @classmethod
    def into(cls, family: Family, model: nn.Module, batch: TrainingBatch) -> _Flow:
        """Run `model` once to record the calls of its blocks, and return the batch before the first block."""
        flow = cls(batch.inputs, family.masks(batch.inputs), {}, {}, {})
        before: Streams = {}

        def keep(call: BlockCall) -> None:
            nonlocal before
            flow.streams = flow.streams or call.inputs
            slots = {
                name: key for name, value in call.inputs.items() for key in call.kwargs if call.kwargs[key] is value
            }
            if slots.keys() != call.inputs.keys() or (flow.slots and not call.inputs.keys() <= before.keys()):
                raise UsageError(
                    "quantize.rounding=least_squares needs blocks that pass each stream to the next as one tensor, "
                    f"and block {call.stack}.{call.index} reads a stream that is not the output of the block before: "
                    "use quantize.rounding=nearest."
                )
            before = call.outputs
            flow.slots[call.key] = slots
            flow.calls[call.key] = {key: value for key, value in call.kwargs.items() if key not in slots.values()}

        observe(family, model, batch.inputs, keep)
        return flow

    def arguments(self, key: BlockKey) -> dict[str, Any]:
        return self.calls[key] | {slot: self.streams[name] for name, slot in self.slots[key].items()}

    def advance(self, family: Family, key: BlockKey, block: nn.Module) -> None:
        self.streams = family.streams_out(key[0], block(**self.arguments(key)), self.inputs)

    def rows(self, family: Family, name: str, inputs: Tensor) -> Tensor:
        """Return a linear layer's inputs as `[samples, dim_in]`, without padded text tokens."""
        mask = self.masks.get(family.stream_of(name)) if inputs.dim() == 3 else None
        return inputs.flatten(0, -2) if mask is None else inputs[mask]


def _sharing_inputs(inputs: dict[str, Tensor]) -> list[list[str]]:
    """Group the names of layers that read the same tensor object, in order of execution."""
    groups: dict[int, list[str]] = {}
    for name, tensor in inputs.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


@torch.no_grad()
def round_blocks(
    family: Family,
    model: nn.Module,
    batches: Sequence[TrainingBatch],
    chosen: Iterable[str],
    round_layers: Callable[[list[nn.Linear], InputMoments], None],
    *,
    prepare: Callable[[], None] = lambda: None,
    each_block: Callable[[Blocks], Blocks] = lambda blocks: blocks,
) -> None:
    """Call `round_layers` for the linear layers in the blocks of `model` that `chosen` names, in order of execution.

    Layers that read the same tensor are passed together, with the moments of that tensor over `batches`: in the
    original model, and in the model with all earlier layers rounded. A layer that is never called is passed alone, with
    empty moments. `prepare` is called once after the original model has run, to round the layers outside of the blocks.
    `each_block` wraps the loop over blocks, such as with a progress bar. Memory holds two copies of one block at a
    time. Raises `UsageError` if a block reads a stream that is not the output of the block before.
    """
    given = [_Flow.into(family, model, batch) for batch in batches]
    prepare()
    rounded = [_Flow.into(family, model, batch) for batch in batches]
    for key, block in each_block(list(family.blocks(model).items())):
        prefix = f"{key[0]}.{key[1]}."
        names = [name.removeprefix(prefix) for name in chosen if name.startswith(prefix)]
        original = copy.deepcopy(block)
        reached = inputs_of(original, names, given[0].arguments(key)) if names else {}
        for group in _sharing_inputs(reached):
            layers = [_linear(block, name) for name in group]
            moments = InputMoments(layers[0].in_features, layers[0].weight.device)
            for before, now in zip(given, rounded, strict=True):
                x, x_rounded = (
                    flow.rows(family, group[0], inputs_of(part, group[:1], flow.arguments(key))[group[0]])
                    for flow, part in ((before, original), (now, block))
                )
                moments.add(x_rounded, x)
            round_layers(layers, moments)
        for layer in (_linear(block, name) for name in names if name not in reached):
            round_layers([layer], InputMoments(layer.in_features, layer.weight.device))
        for before, now in zip(given, rounded, strict=True):
            before.advance(family, key, original)
            now.advance(family, key, block)


def _linear(block: nn.Module, name: str) -> nn.Linear:
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


@torch.no_grad()
def round_linears(
    layers: Sequence[nn.Linear], moments: InputMoments, *, scheme: str, group_size: int | None, damping: float
) -> None:
    """Round layers that read the same inputs, so that their outputs change least in the mean square.

    Their weights become torchao tensors of `scheme` (`int8` or `int4`). If all of them have a bias, the biases change
    too: they correct the mean error of the outputs. `damping` is relative to the mean square of the inputs.
    """
    dtype = layers[0].weight.dtype
    weight = torch.cat([layer.weight.double() for layer in layers])
    biased = moments.count > 0 and all(layer.bias is not None for layer in layers)
    gram, cross = moments.centred() if biased else (moments.gram, moments.cross)
    target = best_weight(weight, gram, cross, damping)
    int8 = scheme == "int8"  # torchao keeps its scales in float32 whatever the model's dtype
    stored, size = torch.float32 if int8 else dtype, group_size or weight.shape[1]
    grid = spanning_grid(target, size, BITS[scheme], stored, symmetric=int8)
    ints, grid = round_least_squares(target, damped(gram, damping), grid)
    lost = (weight @ moments.sum_given - grid.values(ints) @ moments.sum_rounded) / max(1, moments.count)
    start = 0
    for layer in layers:
        rows = slice(start, start + layer.out_features)
        start = rows.stop
        part = grid.with_values(grid.scale[rows], grid.zero[rows])
        if biased:
            layer.bias = nn.Parameter((layer.bias.double() + lost[rows]).to(dtype), requires_grad=False)
        layer.weight = nn.Parameter(torchao_tensor(ints[rows], part, dtype), requires_grad=False)
