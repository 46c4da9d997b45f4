"""Parameter counts of a model and of its pruned form, on the meta device: no weights, no download."""

from __future__ import annotations

from typing import Any

import torch

from ppcl.artifacts import Intervals
from ppcl.families.base import Family
from ppcl.surgery.depth import kept_layers


def count_parameters(family: Family, arch: dict[str, Any], intervals: Intervals) -> dict[str, int]:
    """`{"teacher": ..., "student": ..., "teacher_layers": ..., "student_layers": ...}` of the transformer."""
    with torch.device("meta"):
        transformer = family.transformer_class.from_config(arch)  # type: ignore[attr-defined]
    total = sum(parameter.numel() for parameter in transformer.parameters())
    removed, layers, left = 0, 0, 0
    for stack in family.stacks:
        blocks = getattr(transformer, stack)
        kept = set(kept_layers(len(blocks), intervals.get(stack, [])))
        layers, left = layers + len(blocks), left + len(kept)
        for index, block in enumerate(blocks):
            if index not in kept:
                removed += sum(parameter.numel() for parameter in block.parameters())
    return {
        "teacher": total,
        "student": total - removed,
        "teacher_layers": layers,
        "student_layers": left,
    }
