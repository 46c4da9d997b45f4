"""Counts the parameters of a model and of its pruned form on the meta device, without weights or a download."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ppcl.artifacts.plan import Intervals, Width
from ppcl.families.base import Family
from ppcl.layers import Layout, kept_layers
from ppcl.surgery.width import prune_blocks
from ppcl.taps import BlockKey, stack_of


def _size(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def on_meta(family: Family, arch: Mapping[str, Any]) -> nn.Module:
    """Return the family's transformer with the config `arch`, without values."""
    with torch.device("meta"):
        transformer: nn.Module = family.transformer_class.from_config(arch)
    return transformer


def block_sizes(family: Family, transformer: nn.Module) -> tuple[dict[BlockKey, int], int]:
    """Return the number of parameters of each block, and of the whole transformer."""
    return {key: _size([block]) for key, block in family.blocks(transformer).items()}, _size([transformer])


def count_parameters(
    family: Family,
    arch: dict[str, Any],
    intervals: Intervals,
    width: Width | None = None,
    layout: Layout | None = None,
) -> dict[str, int]:
    """Count the transformer's parameters and blocks before and after pruning.

    Returns the parameters `teacher` and `student`, and the blocks `teacher_layers` and `student_layers`. If `width`
    names blocks, it also returns the parameters left after each step: `depth`, `text`, and `ffn`, which equals
    `student`. `arch` is the teacher's config.
    """
    transformer = on_meta(family, arch)
    total = _size([transformer])
    left = {"depth": total, "text": total, "ffn": total}
    layers = [0, 0]
    for stack in family.stacks:
        blocks = list(stack_of(transformer, stack))
        kept = kept_layers(len(blocks), intervals.get(stack, []))
        modules = [blocks[index] for index in kept]
        layers = [layers[0] + len(blocks), layers[1] + len(kept)]
        sets = (width or {}).get(stack, {"text": [], "ffn": []})
        for step, text, ffn in (("depth", [], []), ("text", sets["text"], []), ("ffn", sets["text"], sets["ffn"])):
            pruned = prune_blocks(family, stack, kept, modules, text, ffn, layout or Layout(), {})
            left[step] += _size(pruned) - _size(blocks)
    counts = {"teacher": total, "student": left["ffn"], "teacher_layers": layers[0], "student_layers": layers[1]}
    return counts | left if any(sets[kind] for sets in (width or {}).values() for kind in sets) else counts
