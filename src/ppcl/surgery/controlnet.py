"""ControlNets of the full model on a pruned one.

A ControlNet gives fewer residuals than there are blocks, and diffusers spreads them by the number of blocks it
finds: on a pruned model most would land on the wrong ones. Here each kept block gets the residual of its
place in the full model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ppcl.errors import UsageError
from ppcl.families.facts import FamilyFacts
from ppcl.families.registry import family_of_transformer
from ppcl.surgery.remap import provenance_of


def expand(samples: Sequence[Any], kept: Sequence[int], num_blocks: int, *, repeat: bool = False) -> list[Any]:
    """One residual per kept block: what the full model with `num_blocks` adds after the block that was there.

    `repeat` is for ControlNets whose residuals go round (diffusers' `controlnet_blocks_repeat`).
    """
    every = math.ceil(num_blocks / len(samples))
    return [samples[index % len(samples) if repeat else index // every] for index in kept]


def place_residuals(transformer: nn.Module) -> RemovableHandle:
    """Make an exported model take a full model's ControlNet; `remove()` the handle to undo it."""
    provenance = provenance_of(transformer)
    kept: dict[str, list[int]] = provenance["kept_layers"]
    removed: dict[str, list[list[int]]] = provenance["removed_intervals"]
    # A block that is gone lies in an interval.
    counts = {stack: 1 + max([*indices, *(v for _, v in removed.get(stack, []))]) for stack, indices in kept.items()}
    facts = family_of_transformer(type(transformer).__name__)
    if facts is None or not facts.residuals:
        raise UsageError(f"{type(transformer).__name__} takes no ControlNet that ppcl knows of.")
    return hook_residuals(transformer, facts, kept, counts)


def hook_residuals(
    transformer: nn.Module, facts: FamilyFacts, kept: Mapping[str, Sequence[int]], counts: Mapping[str, int]
) -> RemovableHandle:
    """Expand residuals before every forward; `kept` says which blocks, of how many, are in.

    Called again it says anew what is in: residuals that two hooks expanded would go astray.
    """
    if (earlier := getattr(transformer, "_residual_hook", None)) is not None:
        earlier.remove()

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        repeat = kwargs.get("controlnet_blocks_repeat", False)
        placed = dict(kwargs)
        for stack, argument in facts.residuals.items():
            samples = kwargs.get(argument)
            if samples:
                again = repeat and stack in facts.repeated_residuals
                placed[argument] = expand(samples, kept[stack], counts[stack], repeat=again)
        if repeat:
            placed["controlnet_blocks_repeat"] = False  # expanded: one each
        return args, placed

    handle = transformer.register_forward_pre_hook(before, with_kwargs=True)
    transformer._residual_hook = handle  # type: ignore[assignment]
    return handle
