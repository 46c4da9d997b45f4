"""Uses a ControlNet of the full model with a pruned model.

A ControlNet returns fewer residuals than there are blocks. diffusers spreads them evenly over the blocks of the model,
so on a pruned model most would be added after the wrong block. Here each kept block gets the residual that its
counterpart in the full model gets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ppcl.errors import UsageError
from ppcl.families.facts import FamilyFacts
from ppcl.families.registry import family_of_transformer
from ppcl.layers import BlockMap
from ppcl.surgery.provenance import exported_blocks


def expand(samples: Sequence[Any], kept: Sequence[int], num_blocks: int, *, repeat: bool = False) -> list[Any]:
    """Return one residual for each block in `kept`, given by its index in the full model of `num_blocks` blocks.

    Block i gets residual floor(i / ceil(num_blocks / len(samples))), as in diffusers. With `repeat` it gets residual
    i mod len(samples), as with diffusers' `controlnet_blocks_repeat`.
    """
    every = math.ceil(num_blocks / len(samples))
    return [samples[index % len(samples) if repeat else index // every] for index in kept]


def place_residuals(transformer: nn.Module) -> RemovableHandle:
    """Make an exported transformer work with a ControlNet of the full model.

    Returns the handle of a forward hook; its `remove()` undoes the change. Raises `UsageError` for a transformer that
    ppcl did not export, and for a class whose ControlNets ppcl does not know.
    """
    blocks = exported_blocks(transformer)
    facts = family_of_transformer(type(transformer).__name__)
    if facts is None or not facts.residuals:
        raise UsageError(f"{type(transformer).__name__} takes no ControlNet that ppcl knows of.")
    return hook_residuals(transformer, facts, blocks)


def hook_residuals(transformer: nn.Module, facts: FamilyFacts, blocks: BlockMap) -> RemovableHandle:
    """Register a hook that assigns ControlNet residuals to blocks before every forward.

    `blocks`: which blocks of the full model `transformer` has. A second call replaces the hook of the first, since
    residuals must be expanded once only.
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
                placed[argument] = expand(samples, blocks.kept[stack], blocks.counts[stack], repeat=again)
        if repeat:
            placed["controlnet_blocks_repeat"] = False  # already expanded: one per block
        return args, placed

    handle = transformer.register_forward_pre_hook(before, with_kwargs=True)
    transformer._residual_hook = handle  # type: ignore[assignment]
    return handle
