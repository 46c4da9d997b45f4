"""Maps LoRAs of the full model to a pruned model.

A LoRA names blocks by number. On a model with fewer blocks, diffusers would load it into the wrong blocks and warn only
about the numbers that do not exist. So this module renumbers blocks by the `kept_layers` in an export's config.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.errors import UsageError
from ppcl.families.registry import family_of_transformer
from ppcl.surgery.lora_files import layer_names, read_file, read_lora, scaled, scales_of
from ppcl.surgery.lora_layers import Layers, lora_loader, stock_class
from ppcl.surgery.lora_marks import COUNTS, blocks_for, mark_of, read_mark, with_mark
from ppcl.surgery.provenance import earlier_models, exported_blocks

SOURCES = ("first", "mean", "sum")
_PREFIX = "transformer."
_SIDES = {"lora_A.weight": "A", "lora_B.weight": "B"}


@dataclass
class RemappedLora:
    """A LoRA for a pruned model, which its pipeline's `load_lora_weights` takes.

    `state`: tensors with PEFT's keys; every scale is multiplied into B. `dropped`: the full model's layers whose LoRA
    has no counterpart in the pruned model. `left_out`: names in the file that diffusers leaves out on the full model
    too.
    """

    state: dict[str, Tensor]
    dropped: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def layers(self) -> list[str]:
        """The names of the pruned model's layers that the LoRA goes onto."""
        return layer_names(self.state)


def _place(name: str, stacks: Iterable[str]) -> tuple[str, int, str] | None:
    """Split the name of a module into stack, block number and name within the block; None if it is in no stack."""
    for stack in stacks:
        number, _, inner = name.removeprefix(f"{stack}.").partition(".")
        if name.startswith(f"{stack}.") and number.isdigit() and inner:
            return stack, int(number), inner
    return None


def remap_lora(
    lora: Mapping[str, Tensor] | str | Path,
    transformer: Any,
    *,
    source: str = "first",
    metadata: Mapping[str, Any] | None = None,
    counts: str | None = None,
    pipeline_class: Any = None,
) -> RemappedLora:
    """Map a LoRA of a full model to an exported `transformer`, which may be on the meta device.

    `lora` is a safetensors file of any format that diffusers reads, or its tensors, as in the file or as
    `pipeline.lora_state_dict` returns them. `metadata`: PEFT's metadata, where tensors are given. A student block
    replaces blocks u to v. With `source=first` it gets the LoRA of block u. With `mean` or `sum` it gets the mean or
    the sum of the LoRAs of all these blocks, as one LoRA of higher rank. LoRAs of layers that a width-pruned block does
    not have are dropped. If it has kept half of a modulation, that half of the LoRA is kept.

    `counts`: `pruned` for a LoRA that was trained on this pruned model, and counts its blocks. None: it says so itself,
    as those that ppcl trained do, or is of the full model (`full`).

    `pipeline_class`: the diffusers class of the model's pipeline. It is needed only for a model of no known family, and
    only where the LoRA's names are neither diffusers' nor PEFT's.

    Raises `UsageError` if it is no plain LoRA, if it does not fit the model that it counts, or if nothing is left.
    """
    blocks = exported_blocks(transformer)
    loader = lora_loader(family_of_transformer(type(transformer).__name__), pipeline_class)
    if not hasattr(transformer, "load_lora_adapter"):
        raise UsageError(f"{type(transformer).__name__} of diffusers loads no LoRAs.")
    if counts not in (None, *COUNTS):
        raise UsageError(f"lora.counts={counts} is not one of {', '.join(COUNTS)}.")
    if isinstance(lora, (str, Path)):
        lora, stored = read_file(Path(lora))
        metadata = stored if metadata is None else metadata
    mark = read_mark(lora, metadata)
    if counts is None and mark == mark_of(blocks.kept):
        raise UsageError("this LoRA counts the blocks of this pruned model already: load it as it is.")
    modules = dict(transformer.named_modules())
    if counts == "pruned":
        blocks = blocks.since(blocks.kept)
        layers = Layers(transformer, blocks.kept, loader)
    else:
        blocks = blocks_for(None if counts == "full" else mark, blocks, earlier_models(transformer))
        layers = Layers.of_full_model(stock_class(transformer), transformer.config, blocks, loader)
    found = read_lora(lora, metadata, layers)
    mapped = map_blocks(found.state, modules, blocks.kept, blocks.removed, source=source)
    if not mapped.state:
        raise UsageError(
            f"nothing of this LoRA is left on the pruned model: all of its {len(mapped.dropped)} layers, such as "
            f"{mapped.dropped[0]}, are of blocks that are gone; lora.source=mean gives their LoRA to students."
        )
    mapped.state = with_mark(mapped.state, mark_of(exported_blocks(transformer).kept))
    mapped.left_out = found.left_out
    return mapped


def map_blocks(
    state: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    kept: Mapping[str, Sequence[int]],
    removed: Mapping[str, list[Any]],
    *,
    source: str = "first",
    metadata: Mapping[str, Any] | None = None,
) -> RemappedLora:
    """Do what `remap_lora` does with plain keys, such as `transformer.NAME.lora_A.weight`.

    The transformer is given by its named `modules`. For each stack, `kept` holds the full model's indices of its
    blocks, and `removed` the intervals [u, v].
    """
    if source not in SOURCES:
        raise UsageError(f"lora.source={source} is not one of {', '.join(SOURCES)}.")
    pairs, others = _pairs(state)
    scales = _scales(pairs, metadata)
    ends = {stack: dict(found) for stack, found in removed.items()}
    places = {name: _place(name, kept) for name in pairs}
    result, used = RemappedLora(dict(others)), set()
    for stack, indices in kept.items():
        for place, u in enumerate(indices):
            last = u if source == "first" else ends.get(stack, {}).get(u, u)
            inside = [found for found in places.values() if found and found[0] == stack and u <= found[1] <= last]
            for inner in sorted({name for _, _, name in inside}):
                members = [f"{stack}.{index}.{inner}" for index in range(u, last + 1)]
                members = [name for name in members if name in pairs]
                found = modules.get(f"{stack}.{place}.{inner}")
                target = getattr(found, "base_layer", found)  # PEFT wraps a layer that has a LoRA already
                weight = getattr(target, "weight", None)
                if weight is None or weight.ndim < 2:
                    continue
                share = 1 / (last - u + 1) if source == "mean" else 1.0
                joined = _join([(*pairs[name], share * scales[name]) for name in members], weight.shape)
                if joined is None:
                    raise UsageError(f"this LoRA does not fit: {members[0]} is of another size than the model's.")
                used.update(members)
                for side, value in zip(_SIDES, joined, strict=True):
                    result.state[f"{_PREFIX}{stack}.{place}.{inner}.{side}"] = value
    for name in pairs:
        if places[name] is None:
            a, b = pairs[name]
            result.state[f"{_PREFIX}{name}.lora_A.weight"] = a
            result.state[f"{_PREFIX}{name}.lora_B.weight"] = scaled(b, scales[name])
        elif name not in used:
            result.dropped.append(name)
    return result


def _pairs(state: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Return A and B for every module of the transformer, and the tensors of other components."""
    halves: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, value in state.items():
        if key.startswith("text_encoder"):
            others[key] = value
            continue
        name, _, side = key.removeprefix(_PREFIX).rpartition(".lora_")
        halves.setdefault(name, {})[side[0]] = value
    return {name: (found["A"], found["B"]) for name, found in halves.items()}, others


def _scales(pairs: Mapping[str, tuple[Tensor, Tensor]], metadata: Mapping[str, Any] | None) -> dict[str, float]:
    plain = {key.removeprefix(_PREFIX): value for key, value in (metadata or {}).items()}
    return scales_of({f"{name}.lora_B.weight": b for name, (_, b) in pairs.items()}, plain)


def _join(members: list[tuple[Tensor, Tensor, float]], shape: torch.Size) -> tuple[Tensor, Tensor] | None:
    """Join the (A, B, scale) of `members` to one pair with B A = sum of scale_i B_i A_i.

    Returns None if that does not fit a weight of this `shape`. Two larger shapes are cut to the part that a
    width-pruned block keeps: the attention's half of a modulation (rows), and the fifth of a single-stream output
    projection that reads the attention (columns).
    """
    a = torch.cat([a for a, _, _ in members])
    b = torch.cat([scaled(b, scale) for _, b, scale in members], dim=1)
    rows, columns, *kernel = shape
    if (len(b), a.shape[1]) not in ((rows, columns), (2 * rows, columns), (rows, 5 * columns)):
        return None
    if [*a.shape[2:]] != kernel:
        return None
    return a[:, :columns].contiguous(), b[:rows].contiguous()
